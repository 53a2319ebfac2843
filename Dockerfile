# Images of cosmos-host, without Python. With BuildKit or buildah, from the repository's root:
#     docker build -t cosmos-host .                          Debian slim and redis-server: for every launcher
#     docker build --target static -t cosmos-host:static .   the static program and nothing else: CPUs, one process, or a
#                                                            Redis elsewhere
# For GPUs: --build-arg FEATURES=burn-cuda --build-arg BASE=IMAGE, with an IMAGE of Debian 12, Ubuntu 24.04 or newer that has
# NVRTC 13 (and NCCL for several GPUs); the driver's libraries come from the NVIDIA container toolkit.
#
# Both run as any user, by default as 1000, and with a read-only root: they write only to /tmp and to where a run's output
# goes. No certificates are installed, because the program brings those of the public authorities. tests/images.sh
# builds and tries both.
ARG BASE=debian:bookworm-slim
ARG RUST=rust:1.95-slim-bookworm

FROM ${RUST} AS source
WORKDIR /source
COPY . .
# Everything that both images have beside the program.
RUN mkdir -p -m 1777 /image/tmp /image/opt/cosmos-host \
    && cp -r --parents configs plugins/dist LICENSE /image/opt/cosmos-host

# Dependencies stay compiled between builds. The crates of the repository are always compiled again: files of another
# checkout may be older than what was built from them, and Cargo goes by dates.
FROM source AS build
ARG FEATURES=""
RUN --mount=type=cache,id=cosmos-host-registry,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,id=cosmos-host-target,target=/source/target,sharing=locked \
    touch host/*/src/lib.rs host/*/src/main.rs \
    && cargo build --release --locked -p cosmos-host --features "$FEATURES" \
    && mkdir -p /image/usr/local/bin && strip -o /image/usr/local/bin/cosmos-host target/release/cosmos-host

# CUDA's libraries are loaded at run time, which a static program cannot do.
FROM source AS build-static
RUN --mount=type=cache,id=cosmos-host-registry,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,id=cosmos-host-target,target=/source/target,sharing=locked \
    touch host/*/src/lib.rs host/*/src/main.rs \
    && cargo rustc --release --locked -p cosmos-host --bin cosmos-host -- -C target-feature=+crt-static \
    && mkdir -p /image/usr/local/bin && strip -o /image/usr/local/bin/cosmos-host target/release/cosmos-host

FROM scratch AS static
LABEL org.opencontainers.image.title="cosmos-host" \
    org.opencontainers.image.description="On-policy distillation of language models: the static program for CPUs" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build-static /image /
# /tmp is the home of a user that the image does not know.
ENV PATH=/usr/local/bin HOME=/tmp
WORKDIR /opt/cosmos-host
USER 1000:1000
ENTRYPOINT ["cosmos-host"]
CMD ["--help"]

FROM ${BASE} AS full
LABEL org.opencontainers.image.title="cosmos-host" \
    org.opencontainers.image.description="On-policy distillation of language models, with a Redis server for runs of many processes" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.licenses="Apache-2.0"
RUN apt-get update && apt-get install --yes --no-install-recommends redis-server && rm -rf /var/lib/apt/lists/*
COPY --from=build /image /
ENV HOME=/tmp
WORKDIR /opt/cosmos-host
USER 1000:1000
ENTRYPOINT ["cosmos-host"]
CMD ["--help"]
