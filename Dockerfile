FROM python:3.13-slim

RUN useradd --system --uid 10001 --no-create-home dropzone \
    && install --directory --owner=dropzone /data

WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir --disable-pip-version-check --requirement requirements.txt
COPY dropzone.py dropzone.html ./
COPY backends ./backends
RUN python -m compileall -q dropzone.py backends

ENV PYTHONUNBUFFERED=1 \
    DROPZONE_SERVER_HOST=0.0.0.0 \
    DROPZONE_SERVER_PORT=8080 \
    DROPZONE_RAW_DIR=/data/raw \
    DROPZONE_STORAGE_SQLITE_PATH=/data/dropzone.sqlite

USER 10001
VOLUME /data
EXPOSE 8080

# Whether it can land payloads. A container that runs another command has no health to check.
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s CMD ["python", "/app/dropzone.py", "ready"]

# The program itself is what signals reach: SIGTERM ends it in order, with exit code 0.
ENTRYPOINT ["python", "/app/dropzone.py"]
