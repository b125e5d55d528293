# For NVIDIA GPUs: docker build -f docker/cuda.Dockerfile -t linvideo-jax .
# The CUDA libraries come with JAX's packages; the host gives the driver (docker run --gpus=all).
FROM python:3.12-slim
WORKDIR /linvideo_jax
COPY . .
RUN pip install --no-cache-dir --editable ".[cuda]"
ENTRYPOINT ["python", "train.py"]
