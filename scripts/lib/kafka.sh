# shellcheck shell=bash
# The Kafka server that tests start: its jars, in build/kafka.  Sourced after common.sh.
#
#   install_kafka   brings them with Maven, which knows the machine's mirrors and proxies, and compares each with the
#                   list of sums.  Does nothing, quickly, where they are there.
#   pin_kafka       writes the list of sums anew, after a change of pom.xml

readonly KAFKA_POM=$ROOT/scripts/lib/kafka/pom.xml
readonly KAFKA_SUMS=$ROOT/scripts/lib/kafka/SHA256SUMS
readonly KAFKA_JARS=$ROOT/build/kafka
# Maven retries by itself; a download that takes longer hangs.
readonly KAFKA_LIMIT_S=600

install_kafka() {
    mkdir -p "$ROOT/build"
    (
        flock 9
        make_kafka 9>&-
    ) 9>"$ROOT/build/.kafka.lock"
}

make_kafka() {
    local stamp fresh=$KAFKA_JARS.new
    stamp=$(cat "$KAFKA_POM" "$KAFKA_SUMS" | sha256sum | cut -d' ' -f1)
    [[ $(cat "$KAFKA_JARS/.stamp" 2>/dev/null) == "$stamp" ]] && return 0
    say "bringing the Kafka server for tests into $KAFKA_JARS"
    copy_kafka "$fresh"
    (cd "$fresh" && sha256sum --check --strict --quiet "$KAFKA_SUMS" >&2) ||
        die "a jar of the Kafka server is not what $KAFKA_SUMS says"
    [[ $(find "$fresh" -name '*.jar' | wc -l) == $(wc -l <"$KAFKA_SUMS") ]] ||
        die "the Kafka server came with jars that $KAFKA_SUMS does not name"
    printf '%s\n' "$stamp" >"$fresh/.stamp"
    rm -rf "$KAFKA_JARS"
    mv "$fresh" "$KAFKA_JARS"
}

# copy_kafka DIRECTORY: the jars, with the checksums of the repository they came from verified.
copy_kafka() {
    rm -rf "$1"
    retry 3 timeout "$KAFKA_LIMIT_S" mvn --batch-mode --quiet -Dstyle.color=never --strict-checksums --file "$KAFKA_POM" \
        dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$1" >&2 ||
        die "the Kafka server could not be brought with Maven"
}

pin_kafka() {
    copy_kafka "$KAFKA_JARS.new"
    (cd "$KAFKA_JARS.new" && sha256sum -- *.jar) >"$KAFKA_SUMS"
}
