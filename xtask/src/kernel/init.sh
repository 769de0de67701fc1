#!/bin/busybox sh
# The first process of a guest: makes the machine, runs the tests, says how they ended, switches off.
# Serial lines: 0 the kernel's console, 1 what the tests print, 2 the result.
export PATH=/usr/bin:/bin RUST_BACKTRACE=1
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /run /tmp /var/log/nginx /var/lib/nginx
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t bpf bpf /sys/fs/bpf
exec >/dev/ttyS1 2>&1 </dev/null
stty -F /dev/ttyS1 raw
while read -r module; do
    insmod "/lb/modules/$module.ko" || echo "insmod $module failed" >/dev/ttyS2
done </lb/modules/order
ip link set lo up
export LB_AGENT=/lb/agent LB_OBJECT=/lb/object LB_PATIENCE=8
while read -r program filter; do
    echo "$program on $(uname -r):"
    # Without a filter there is no argument.
    "/lb/tests/$program" --test-threads=2 --show-output ${filter:+"$filter"} || echo "$program failed" >/dev/ttyS2
done </lb/list
echo done >/dev/ttyS2
poweroff -f
