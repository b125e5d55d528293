# For TPU slices: docker build -f docker/tpu.Dockerfile -t linvideo-jax .
FROM python:3.12-slim
WORKDIR /linvideo_jax
COPY . .
RUN pip install --no-cache-dir --editable ".[tpu]"
ENTRYPOINT ["python", "train.py"]
