#!/usr/bin/env bash
# Installs the Debian packages that the tests use, if they are missing. A mirror
# that is slow or away for a moment is tried again; if that does not help, the
# tests that need what is missing say so.
set -euo pipefail
want=(iproute2 nftables nbdkit libnbd-bin python3-libnbd nbd-client fio qemu-utils e2fsprogs xfsprogs fuse3 jq
  qemu-system-x86 busybox-static linux-image-cloud-amd64 gcc libc6-dev curl
  ceph-mon ceph-osd ceph-common)

# missing lists the packages that are not there, whole.
missing() {
  for p in "${want[@]}"; do
    dpkg-query -W -f='${Status}\n' "$p" 2>/dev/null | grep -q '^install ok installed$' || echo "$p"
  done
}

mapfile -t left < <(missing)
[ ${#left[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ]; then
  echo "not root: cannot install ${left[*]}; the tests that need them will say so" >&2
  exit 0
fi
echo "installing: ${left[*]}"
export DEBIAN_FRONTEND=noninteractive
apt=(timeout 600 apt-get -qq -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3 -o Acquire::http::Timeout=30)
dpkg --configure -a >/dev/null || true # what an interrupted run has left
for pause in 5 20 60 0; do
  # Packages may still come from lists that are there when no new ones can be had.
  "${apt[@]}" update || echo "apt-get update failed" >&2
  "${apt[@]}" install -y --no-install-recommends "${left[@]}" >/dev/null || true
  mapfile -t left < <(missing)
  [ ${#left[@]} -eq 0 ] && exit 0
  sleep $pause
done
for p in "${left[@]}"; do # one that cannot be had must not keep out the others
  "${apt[@]}" install -y --no-install-recommends "$p" >/dev/null || true
done
mapfile -t left < <(missing)
[ ${#left[@]} -eq 0 ] || echo "cannot install ${left[*]}; the tests that need them will say so" >&2
