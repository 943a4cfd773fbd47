# Many images have Python 3.10, and this needs 3.11.
for python in python3.11 python3.12 python3.13; do
    if "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        break
    fi
done
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    sudo apt-get update -qq
    sudo apt-get install -y -qq python3.11-venv
    python=python3.11
fi
"$python" -m venv .venv
.venv/bin/pip install --quiet --constraint constraints.txt --editable '{{package}}'
