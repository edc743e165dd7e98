# nightseg for clusters and for machines without Python 3.11: the versions of constraints.txt on Ray's own image.
#   docker build -t nightseg .
#   docker run --rm --shm-size=4g -v "$PWD/data:/data" -v "$PWD/runs:/runs" nightseg run configs/demo.yaml
# For GPUs: docker build --build-arg BASE=rayproject/ray:2.60.0-py311-gpu -t nightseg . ; docker run --gpus all ...
# The image needs no network when it runs, and runs as the user `ray` of its base.
ARG BASE=rayproject/ray:2.60.0-py311
FROM ${BASE}
WORKDIR /home/ray/nightseg
COPY --chown=ray:users pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY --chown=ray:users nightseg nightseg
COPY --chown=ray:users jobs jobs
COPY --chown=ray:users configs configs
RUN pip install --no-cache-dir --constraint constraints.txt '.[tensorboard]'
ENV NIGHTSEG_RUNS=/runs RAY_USAGE_STATS_ENABLED=0
ENTRYPOINT ["nightseg"]
CMD ["--help"]
