# shellcheck shell=bash
# The checks that run nothing: format, lint, types, imports.  Sourced after common.sh; needs install_venv dev.

# mypy and import-linter look for files, not for what an import would find, so they get a tree that looks like the
# installed package: build/import/apollofs/{blobstore,fs,metadata}, links to the folders at the top.
link_import_tree() {
    local folder
    mkdir -p "$ROOT/build/import/apollofs"
    for folder in blobstore fs metadata; do
        ln -sfn "../../../$folder" "$ROOT/build/import/apollofs/$folder"
    done
}

# step NAME COMMAND...: runs it in the repository root, and counts a failure in FAILED.
step() {
    local name=$1 status=0
    shift
    say "$name"
    (cd "$ROOT" && "$@") || status=$?
    if ((status)); then
        say "$name: failed"
        FAILED+=("$name")
    fi
}

# run_static check|fix
run_static() {
    local mode=$1
    link_import_tree
    if [[ $mode == fix ]]; then
        step "ruff format" "$VENV/bin/ruff" format --quiet .
        step "ruff check" "$VENV/bin/ruff" check --quiet --fix .
    else
        step "ruff format" "$VENV/bin/ruff" format --quiet --check .
        step "ruff check" "$VENV/bin/ruff" check --quiet .
    fi
    step "mypy" "$VENV/bin/mypy" --no-error-summary -p apollofs.blobstore -p apollofs.fs -p apollofs.metadata -p tests
    step "import-linter" env PYTHONPATH=build/import "$VENV/bin/lint-imports" --no-logo --cache-dir build/import-linter
}
