#!/usr/bin/env bash
# Installs the Debian packages that the tests use, if they are missing.
set -euo pipefail
want=(nbdkit libnbd-bin python3-libnbd nbd-client fio qemu-utils e2fsprogs xfsprogs fuse3 jq
  qemu-system-x86 busybox-static linux-image-cloud-amd64 gcc libc6-dev
  ceph-mon ceph-osd ceph-common)
missing=()
for p in "${want[@]}"; do
  dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ]; then
  echo "not root: cannot install ${missing[*]}; the tests that need them will say so" >&2
  exit 0
fi
echo "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
