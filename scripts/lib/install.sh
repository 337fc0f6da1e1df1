# shellcheck shell=bash
# Debian packages and the virtual environment.  Sourced after common.sh.
#
#   install_packages run|test   what building and running needs; with test, the servers that the tests start too
#   install_venv run|dev        .venv with apollofs (editable), and with dev the tools for checks and tests
#
# Both do nothing, quickly, where everything is there.

# True where the command works or, for what is no command, the package is installed.
is_present() {
    local command=${1%%:*} package=${1##*:}
    [[ $command != "$package" || $1 == *:* ]] && command -v "$command" >/dev/null && return 0
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]]
}

# Prints the first Python that can build and hold apollofs.  Debian's comes before another one on the PATH: it is built
# with profile-guided optimisation, and a mount on one without is a fifth slower.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" /usr/bin/python3 python3; do
        command -v "$candidate" >/dev/null || continue
        if "$candidate" - 2>/dev/null <<'PY'; then
import ensurepip, os, sys, sysconfig, venv
headers = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(not (sys.version_info >= (3, 11) and os.path.exists(headers)))
PY
            "$candidate" -c 'import sys; print(sys.executable)'
            return 0
        fi
    done
    return 1
}

install_packages() {
    local purpose=$1 need missing=()
    # command:package where the command may have come another way; package alone where only that will do.
    local wanted=(gcc:gcc libc6-dev pkg-config:pkg-config libfuse3-dev fusermount3:fuse3 etcd:etcd-server)
    [[ $purpose == test ]] && wanted+=(etcdctl:etcd-client ceph-mon:ceph-mon ceph-osd:ceph-osd radosgw:radosgw git:git rsync:rsync)
    [[ $purpose == test ]] && wanted+=(mkfs.ext4:e2fsprogs libfaketime java:default-jre-headless mvn:maven)
    for need in "${wanted[@]}"; do
        is_present "$need" || missing+=("${need##*:}")
    done
    find_python >/dev/null || missing+=(python3 python3-venv python3-dev)
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null || die "missing, and this is no Debian to install them on: ${missing[*]}"
    say "installing Debian packages: ${missing[*]}"
    apt_install "${missing[@]}"
    find_python >/dev/null || die "Python 3.11 or newer is needed, with venv and headers"
}

installed_packages() { dpkg-query -W -f='${db:Status-Status} ${Package}\n' | sed -n 's/^installed //p' | sort -u; }

# Runs a command while no package may start a service (invoke-rc.d asks policy-rc.d first).
with_services_held() (
    policy=/usr/sbin/policy-rc.d
    if [[ ! -e $policy ]]; then
        trap 'as_root rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
    fi
    "$@"
)

# apt-get install of these packages, with no service started or left enabled by it: it is for their programs that we
# want them.  What was installed before, a running etcd for one, stays as it is.
apt_install() {
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600) before fresh
    before=$(installed_packages)
    retry 3 as_root "${apt[@]}" update >&2 || say "apt-get update failed: trying with the lists that are here"
    retry 3 with_services_held as_root "${apt[@]}" install --no-install-recommends "$@" >&2 ||
        die "apt-get could not install: $*"
    mapfile -t fresh < <(comm -13 <(printf '%s\n' "$before") <(installed_packages))
    ((${#fresh[@]} == 0)) || disable_services "${fresh[@]}"
}

# Disables every unit of these packages, and stops what a local policy has let start.
disable_services() {
    local units now=()
    command -v systemctl >/dev/null || return 0
    mapfile -t units < <(dpkg-query -L "$@" |
        sed -n 's#^\(/usr\)\?/lib/systemd/system/\([^/@]*\.\(service\|socket\|target\|timer\)\)$#\2#p' | sort -u)
    ((${#units[@]})) || return 0
    [[ -d /run/systemd/system ]] && now=(--now)
    as_root systemctl --quiet disable "${now[@]}" "${units[@]}" >&2 || say "could not disable all of: ${units[*]}"
}

# A word for everything that .venv was made from.
venv_stamp() {
    local python=$1
    {
        printf '%s\n' "$ROOT" "$python"
        "$python" -VV
        cat "$ROOT"/pyproject.toml "$ROOT"/setup.py
        find "$ROOT/fs" -maxdepth 1 -name '_fusewire*.[ch]' -print0 | sort -z | xargs -0 --no-run-if-empty cat
    } | sha256sum | cut -d' ' -f1
}

# True where .venv is there, was made for this purpose from what is here now, and has the extension.
venv_is_current() {
    local purpose=$1 stamp=$2
    [[ $(cat "$VENV/.stamp-dev" 2>/dev/null) == "$stamp" ]] ||
        [[ $purpose == run && $(cat "$VENV/.stamp-run" 2>/dev/null) == "$stamp" ]] || return 1
    "$VENV/bin/python" - 2>/dev/null <<'PY'
import importlib.util, sys
sys.exit(importlib.util.find_spec("apollofs.fs._fusewire") is None)
PY
}

base_prefix() { "$1" -c 'import sys; print(sys.base_prefix)' 2>/dev/null; }

install_venv() {
    mkdir -p "$ROOT/build"
    (
        flock 9
        make_venv "$1" 9>&-
    ) 9>"$ROOT/build/.venv.lock"
}

make_venv() {
    local purpose=$1 python stamp extras=''
    [[ $purpose == dev ]] && extras='[dev]'
    python=$(find_python) || die "Python 3.11 or newer is needed, with venv and headers"
    stamp=$(venv_stamp "$python")
    venv_is_current "$purpose" "$stamp" && return 0
    if [[ $(base_prefix "$VENV/bin/python") != "$(base_prefix "$python")" ]]; then
        say "making a virtual environment in $VENV with $python"
        rm -rf "$VENV"
        "$python" -m venv "$VENV"
    fi
    say "installing apollofs and what it needs into $VENV"
    rm -f "$VENV"/.stamp-*
    retry 3 "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --use-pep517 \
        --editable "$ROOT$extras" >&2
    printf '%s\n' "$stamp" >"$VENV/.stamp-$purpose"
}
