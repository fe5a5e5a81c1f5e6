# The gateway as an image: `docker build -t tgi-gateway .`, or `docker compose up`, which runs it as well.
#
# BASE_IMAGE  any image with glibc, Python 3.11 or newer and pip; python:3.12-slim if nothing is said
# wheelhouse  where a build cannot reach a package index, put the locked wheels here first, for the base's Python:
#               pip download --no-deps --require-hashes -r requirements.lock -d wheelhouse
#             then nothing is fetched. Either way every package is checked against the lock's hashes.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS wheels
# a pattern, because it need not be there
COPY requirements.lock wheelhouse* /wheels/

FROM ${BASE_IMAGE} AS packages
RUN python3 -m venv --without-pip /opt/gateway
# --no-deps: the lock names every package; those that the weights' package would like to have are left out
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    if ls /wheels/*.whl >/dev/null 2>&1; then from="--no-index --find-links=/wheels"; fi; \
    python3 -m pip --python /opt/gateway/bin/python install --no-cache-dir --disable-pip-version-check \
      --no-deps --require-hashes ${from:-} -r /wheels/requirements.lock
COPY pyproject.toml README.md LICENSE /source/
COPY gateway /source/gateway
RUN python3 -m pip --python /opt/gateway/bin/python install --no-cache-dir --disable-pip-version-check \
      --no-deps --no-index --no-build-isolation /source

FROM ${BASE_IMAGE}
# llama.cpp's threads; slim images lack it
RUN python3 -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null || \
    { apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*; }
RUN echo 'gateway:x:10001:10001:TGI Gateway:/tmp:/sbin/nologin' >>/etc/passwd && \
    echo 'gateway:x:10001:' >>/etc/group
COPY --from=packages /opt/gateway /opt/gateway
COPY models.yaml /etc/gateway/models.yaml
# a volume that is mounted here (compose.yaml does) belongs to the gateway's user then
RUN python3 -c "import os; os.makedirs('/var/lib/gateway'); os.chown('/var/lib/gateway', 10001, 10001)"
ENV PATH=/opt/gateway/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    GATEWAY_CATALOG=/etc/gateway/models.yaml
USER 10001:10001
# It listens on the container's own loopback until GATEWAY_HOST says otherwise: compose.yaml does, and says why.
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-c", \
  "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ.get('GATEWAY_PORT') or 8000}/health/live\")"]
ENTRYPOINT ["gateway"]
CMD ["serve"]
