# For NVIDIA GPUs: docker build -f docker/cuda.Dockerfile -t linvideo-jax .
# The CUDA libraries come with JAX's packages; the host gives the driver (docker run --gpus=all).
FROM python:3.12-slim
WORKDIR /linvideo_jax
COPY . .
RUN pip install --no-cache-dir --editable ".[cuda]"
# A program may take most of the card: the update's own arrays are large.
ENV XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
ENTRYPOINT ["python", "train.py"]
