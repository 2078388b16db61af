# The project in an image, with CUDA kernels for all generations of GPUs:
#
#   docker build -t mask2former .
#   docker run --gpus all --ipc host -v /data:/data -e DETECTRON2_DATASETS=/data mask2former \
#     train --config-file configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml --num-gpus 8 OUTPUT_DIR /data/run
#
# --ipc host: data loader workers pass batches through shared memory. The toolkit compiles the kernels; torch brings its own
# CUDA libraries, so that the second stage needs only a driver on the host.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3-dev python3-venv g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/mask2former
COPY . .
RUN make env FORCE_CUDA=1 && .venv/bin/python -m pip cache purge

FROM ubuntu:24.04
# What a checkout needs at run time; the compiler serves torch.compile.
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev g++ ffmpeg && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/mask2former /opt/mask2former
WORKDIR /opt/mask2former
ENV PATH=/opt/mask2former/.venv/bin:$PATH
RUN mask2former env
ENTRYPOINT ["mask2former"]
CMD ["env"]
