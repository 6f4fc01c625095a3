# Image for `torchx run -s kubernetes` and other schedulers of containers. Not built where this project is tested.
#   docker build --build-arg DEVICE=cuda --tag registry.example.com/dlrm:0.1.0 .
FROM python:3.11-slim-bookworm
ARG DEVICE=cuda
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY . .
RUN make setup DEVICE=$DEVICE
ENV PATH=/app/.venv/bin:$PATH
CMD ["python", "dlrm_main.py", "--help"]
