#!/usr/bin/env bash
# Builds both images of the Dockerfile with docker or buildah, tries them, and prints their sizes.
#
#   tests/images.sh [static|full]    default: both
#   BASE=IMAGE, RUST=IMAGE           in place of the Dockerfile's, for machines that reach no registry
#   BUILD_OPTIONS=…                  further options of the build, such as --pull-never for buildah
#
# Each image runs as its own user and as another one: version, doctor, a few steps of the quickstart; then as the first
# process of its container until it is told to stop; the full one also as processes over Redis. Every run gets a fresh
# container. Exit 77 where neither docker nor buildah works.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

case "${1:-}" in
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac

if docker info >/dev/null 2>&1; then
    with=docker
elif command -v buildah >/dev/null && ((EUID == 0)); then
    with=buildah
else
    echo "skipped: neither a docker that answers nor buildah (as root) is here"
    exit 77
fi

build() {
    local options=(--target "$1" -t "cosmos-host:$1")
    [[ -z ${BASE:-} ]] || options+=(--build-arg "BASE=$BASE")
    [[ -z ${RUST:-} ]] || options+=(--build-arg "RUST=$RUST")
    # shellcheck disable=SC2206
    options+=(${BUILD_OPTIONS:-})
    case $with in
        docker) DOCKER_BUILDKIT=1 docker build "${options[@]}" . ;;
        buildah) buildah bud --isolation chroot --layers "${options[@]}" . ;;
    esac
}

# inside IMAGE USER COMMAND…: in a fresh container; an empty USER is the image's own.
inside() {
    local image="cosmos-host:$1" user="$2" container status=0
    shift 2
    case $with in
        docker) docker run --rm --init=false ${user:+--user "$user"} --entrypoint cosmos-host "$image" "$@" ;;
        buildah)
            container="$(buildah from --pull-never "localhost/$image")"
            buildah run --isolation chroot ${user:+--user "$user"} "$container" -- cosmos-host "$@" || status=$?
            buildah rm "$container" >/dev/null
            return "$status"
            ;;
    esac
}

ok() { echo "  ok $*"; }
fail() { echo "FAILED $*" >&2; [[ ! -s $work/log ]] || tail -n 20 "$work/log" >&2; exit 1; }

quickstart=(--config configs/quickstart/countdown.toml --plugin plugins/dist/countdown.wasm
    --set train.max_num_steps=3 --set validation.enable=false)

try() {
    local image="$1" user said version
    version="$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)"
    said="$(inside "$image" "" --version)"
    [[ $said == "cosmos-host $version" ]] || fail "$image: says \`$said\`, and Cargo.toml $version"
    grep -q "org.opencontainers.image.version=\"$version\"" Dockerfile || fail "the Dockerfile's label is not $version"
    for user in "" 54321:54321; do
        inside "$image" "$user" doctor >"$work/log" 2>&1 || fail "$image: doctor, user ${user:-its own}"
        inside "$image" "$user" run "${quickstart[@]}" >"$work/log" 2>&1 || fail "$image: quickstart, user ${user:-its own}"
        grep -q '^3 steps, 768 samples' "$work/log" || fail "$image: the quickstart made no 3 steps"
        ok "$image: version, doctor, quickstart as user ${user:-its own}"
        if [[ $image == full ]]; then
            inside "$image" "$user" launch local "${quickstart[@]}" >"$work/log" 2>&1 || fail "$image: processes"
            grep -q '^3 steps, 768 samples' "$work/log" || fail "$image: the processes made no 3 steps"
            ok "$image: processes over Redis as user ${user:-its own}"
        fi
    done
    told_to_stop "$image"
}

# docker stop sends SIGTERM to the first process, which nobody else would end: early, and in the middle of the run.
told_to_stop() {
    [[ $with == docker ]] || { echo "  left out: $1 as a container's first process (buildah runs none)"; return; }
    local container seen until
    for seen in 'nothing yet' '^step 5/'; do
        container="$(docker run -d "cosmos-host:$1" run "${quickstart[@]}" --set train.max_num_steps=400)"
        until=$((SECONDS + 120))
        while [[ $seen != nothing* ]] && ! docker logs "$container" 2>&1 | grep -q "$seen"; do
            ((SECONDS < until)) || fail "$1: \`$seen\` did not come"
            sleep 0.2
        done
        docker stop -t 60 "$container" >/dev/null
        docker logs "$container" >"$work/log" 2>&1
        case "$(docker inspect -f '{{.State.ExitCode}}' "$container") $seen" in
            "75 ^step 5/" | "143 nothing yet" | "75 nothing yet") ;;
            *) fail "$1: ended otherwise when told to stop" ;;
        esac
        docker rm "$container" >/dev/null
    done
    ok "$1: as a container's first process it saves and ends when told to"
}

# Whole contents, and the layers as a registry would keep them: MB are 10^6 bytes.
sizes() {
    local image="$1" whole layers
    case $with in
        docker) docker save "cosmos-host:$image" | tar x -C "$work" ;;
        buildah) buildah push -q --format docker "localhost/cosmos-host:$image" "dir:$work/image" ;;
    esac
    # What is a layer is a tar archive, compressed or not.
    for compress in cat 'gzip -6' 'zstd -q -10'; do
        layers=0
        while read -r file; do
            { gzip -dcq "$file" 2>/dev/null || cat "$file"; } >"$work/layer"
            tar tf "$work/layer" >/dev/null 2>&1 || continue
            layers=$((layers + $($compress <"$work/layer" | wc -c)))
        done < <(find "$work" -type f -size +1k ! -name layer ! -name log ! -name '*.json')
        whole="${whole:-}$(awk -v n="$layers" -v c="${compress%% *}" 'BEGIN { printf "  %s %.1f MB", c, n / 1e6 }')"
    done
    echo "  size of $image:${whole//cat/plain}"
    find "$work" -mindepth 1 ! -name log -delete
}

for image in ${1:-static full}; do
    echo "== $image, with $with"
    build "$image" >"$work/log" 2>&1 || fail "$image: the build"
    try "$image"
    sizes "$image"
done
