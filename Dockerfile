# docker build -t video-mae . && docker run --gpus all --ipc=host --rm -v /data:/data -v "$PWD:/work" video-mae video-mae --version
# The devel image: Triton and DeepSpeed's offloading compile at run time. torch brings its own CUDA libraries of the same version.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# ffmpeg: torchcodec takes its libraries from the system
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ffmpeg python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/video-mae

ENV PATH=/opt/video-mae/bin:$PATH \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    HOME=/tmp

# what changes seldom: the dependencies, with an empty package in place of ours
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir video_mae \
    && pip install --no-cache-dir --constraint constraints.txt ".[all,torchcodec]" "setuptools>=77" wheel

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --force-reinstall .

WORKDIR /work
CMD ["video-mae"]
