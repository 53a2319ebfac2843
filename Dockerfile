# Images of cosmos-host, without Python. With BuildKit, from the repository's root:
#     docker build -t cosmos-host .                          Debian slim and redis-server: for every launcher
#     docker build --target static -t cosmos-host:static .   the static program and nothing else: CPUs, one process, or a
#                                                            Redis elsewhere
# For GPUs: --build-arg FEATURES=burn-cuda --build-arg BASE=IMAGE, with an IMAGE of Debian 12, Ubuntu 24.04 or newer that has
# NVRTC 13 (and NCCL for several GPUs); the driver's libraries come from the NVIDIA container toolkit.
ARG BASE=debian:bookworm-slim

FROM rust:1.95-slim-bookworm AS build
ARG FEATURES=""
WORKDIR /source
COPY . .
RUN cargo build --release --locked -p cosmos-host --features "$FEATURES" && strip -o /cosmos-host target/release/cosmos-host

# Only the last crate is compiled again. CUDA's libraries are loaded at run time, which a static program cannot do.
FROM build AS build-static
RUN cargo rustc --release --locked -p cosmos-host --bin cosmos-host -- -C target-feature=+crt-static \
    && strip -o /cosmos-host target/release/cosmos-host

FROM scratch AS static
COPY --from=build-static /cosmos-host /usr/local/bin/cosmos-host
COPY --from=build-static /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY configs /usr/share/cosmos-host/configs
COPY plugins/dist /usr/share/cosmos-host/plugins
ENV PATH=/usr/local/bin
WORKDIR /tmp
ENTRYPOINT ["cosmos-host"]

FROM ${BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates redis-server && rm -rf /var/lib/apt/lists/*
COPY --from=build /cosmos-host /usr/local/bin/cosmos-host
COPY configs /usr/share/cosmos-host/configs
COPY plugins/dist /usr/share/cosmos-host/plugins
ENTRYPOINT ["cosmos-host"]
