# docs/clusters.md describes both builds. The wheels of torch on PyPI include CUDA.
FROM python:3.11-slim
ARG TORCH_INDEX=https://pypi.org/simple
COPY . /src
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* # for torch.compile
RUN pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" -c /src/constraints.txt torch torchvision \
    && pip install --no-cache-dir -c /src/constraints.txt '/src[exchange]'
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["stepwise"]
