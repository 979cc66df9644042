# The two images: `docker build --target operator .` and `docker build --target trainer .`
# Any base with Python 3.11 or newer and its venv module will do; the local cluster makes one (cluster/base_image.py).
ARG BASE_IMAGE=python:3.12-slim-bookworm

# Empty here. A machine that trusts an authority of its own passes a folder with ca.crt as the named context `certs`;
# it is only ever mounted and is in no layer.
FROM scratch AS certs

# uv, for the build only.
FROM ${BASE_IMAGE} AS tools
RUN --mount=type=bind,from=certs,target=/host-certs \
    --mount=type=bind,source=constraints/tools.txt,target=/tools.txt \
    if [ -f /host-certs/ca.crt ]; then export PIP_CERT=/host-certs/ca.crt; fi \
    && python3 -m venv /tools \
    && /tools/bin/pip install --no-cache-dir --disable-pip-version-check --requirement /tools.txt

# One wheel for both images; the newest layer of each is made of it, a few kilobytes.
FROM tools AS wheel
RUN --mount=type=bind,from=certs,target=/host-certs \
    --mount=type=bind,source=constraints,target=/constraints \
    if [ -f /host-certs/ca.crt ]; then export SSL_CERT_FILE=/host-certs/ca.crt; fi \
    && /tools/bin/uv pip install --no-cache --python /tools/bin/python --constraint /constraints/trainer.txt setuptools
COPY . /source
RUN /tools/bin/uv build --wheel --no-build-isolation --python /tools/bin/python --offline --out-dir /wheel /source

# GPTQModel needs PyPcre, which is published as C source only: compiled here, where its sources and headers are at hand.
FROM tools AS compiled
RUN test -f "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || headers=python3-dev; \
    apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libpcre2-dev pkg-config ${headers:-} \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=certs,target=/host-certs \
    --mount=type=bind,source=constraints/trainer.txt,target=/constraints.txt \
    if [ -f /host-certs/ca.crt ]; then export PIP_CERT=/host-certs/ca.crt; fi \
    && /tools/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /compiled $(grep '^pypcre==' /constraints.txt)

# What both images share: an empty environment, an unprivileged user, and every writable path below /tmp.
FROM ${BASE_IMAGE} AS runtime
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    VIRTUAL_ENV=/opt/venv \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN python3 -m venv --without-pip /opt/venv \
    && echo 'finetune:x:65532:65532::/tmp:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'finetune:x:65532:' >> /etc/group

# Dependencies first: they change seldom. Compiled here, because a pod's root is read-only.
FROM runtime AS operator
RUN --mount=type=bind,from=certs,target=/host-certs \
    --mount=type=bind,from=tools,source=/tools,target=/tools \
    --mount=type=bind,source=constraints/operator.txt,target=/requirements.txt \
    if [ -f /host-certs/ca.crt ]; then export SSL_CERT_FILE=/host-certs/ca.crt; fi \
    && /tools/bin/uv pip install --no-cache --compile-bytecode --requirement /requirements.txt
RUN --mount=type=bind,from=tools,source=/tools,target=/tools \
    --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    /tools/bin/uv pip install --no-cache --offline --no-deps --compile-bytecode /wheel/*.whl
USER 65532:65532
ENTRYPOINT ["finetune-operator"]

FROM runtime AS trainer
RUN --mount=type=bind,from=certs,target=/host-certs \
    --mount=type=bind,from=tools,source=/tools,target=/tools \
    --mount=type=bind,from=compiled,source=/compiled,target=/compiled \
    --mount=type=bind,source=constraints/trainer.txt,target=/requirements.txt \
    if [ -f /host-certs/ca.crt ]; then export SSL_CERT_FILE=/host-certs/ca.crt; fi \
    && /tools/bin/uv pip install --no-cache --compile-bytecode --find-links /compiled --requirement /requirements.txt
# Triton compiles what starts a kernel where it runs (the fast path, on a GPU): a small C file that includes Python.h.
RUN headers="$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')"; \
    test -f "$headers/Python.h" || package=python3-dev; \
    apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev ${package:-} \
    && rm -rf /var/lib/apt/lists/* \
    && echo '#include <Python.h>' | gcc -fsyntax-only -I "$headers" -x c -
RUN --mount=type=bind,from=tools,source=/tools,target=/tools \
    --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    /tools/bin/uv pip install --no-cache --offline --no-deps --compile-bytecode /wheel/*.whl
USER 65532:65532
ENTRYPOINT ["finetune-trainer"]
