#!/usr/bin/env bash
# A real S3 server on one Debian machine, for tests: Ceph's RADOS gateway over one monitor and one
# BlueStore device on a sparse file. Root, loopback only, no systemd. First start with apt: half a minute.
#
#   eval $(tools/s3_server.sh up)    start what is missing; prints the variables that S3 clients read
#   tools/s3_server.sh status|down   down keeps the data
#   tools/s3_server.sh purge         down, and forget the data
#   tools/s3_server.sh kill-gateway  SIGKILL: what clients see when the store dies; `up` brings it back
#
# Environment: S3_PORT=19000 S3_GB=20 S3_DIR=/var/lib/ifvit-s3
set -euo pipefail
PORT=${S3_PORT:-19000} GB=${S3_GB:-20} DIR=${S3_DIR:-/var/lib/ifvit-s3}
KEY=testkey SECRET=testsecret CONF=$DIR/ceph.conf
. "$(dirname "$0")/daemons.sh"

answers() { [ "$(curl -s -m 5 -o /dev/null -w '%{http_code}' --noproxy '*' "http://127.0.0.1:$PORT/")" = 200 ]; }

configure() {
  mkdir -p "$DIR"/{run,log,mon,osd,rgw}
  [ -s "$DIR/fsid" ] || cat /proc/sys/kernel/random/uuid >"$DIR/fsid"
  cat >"$CONF" <<CFG
[global]
fsid = $(cat "$DIR/fsid")
mon initial members = a
mon host = [v2:127.0.0.1:16789,v1:127.0.0.1:16790]
public network = 127.0.0.0/8
# Authentication stays on: without it this radosgw hunts for the monitor for ever.
keyring = $DIR/keyring
auth allow insecure global id reclaim = false
run dir = $DIR/run
pid file = $DIR/run/\$type.pid
admin socket = $DIR/run/\$name.asok
log file = $DIR/log/\$type.log
crash dir = $DIR/log
mon data = $DIR/mon
osd data = $DIR/osd
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail warn = 1
mon data avail crit = 1
[osd]
osd objectstore = bluestore
bluestore block size = $((GB * 1024 * 1024 * 1024))
bluestore block create = true
osd memory target = 1073741824
[client]
rgw frontends = beast endpoint=127.0.0.1:$PORT
rgw data = $DIR/rgw
rgw dns name = 127.0.0.1
# s3fs sends its region as LocationConstraint with mkdir; the zone group here is called "default".
rgw relaxed region enforcement = true
# A killed gateway leaves its watch behind for 30 s; with this cache on, mkdir and rmdir wait for it.
rgw cache enabled = false
rgw thread pool size = 64
rgw gc obj min wait = 60
rgw gc processor period = 60
CFG
}

make_monitor() {
  [ ! -e "$DIR/mon/done" ] || return 0
  rm -rf "$DIR/mon" "$DIR/osd" "$DIR/keyring"; mkdir -p "$DIR/mon" "$DIR/osd"
  ceph-authtool --create-keyring "$DIR/keyring" --gen-key -n mon. --cap mon 'allow *'
  ceph-authtool "$DIR/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *'
  ceph-authtool "$DIR/keyring" --gen-key -n client.rgw.a --cap mon 'allow rwx' --cap osd 'allow rwx'
  ceph-authtool "$DIR/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
  monmaptool --create --clobber --fsid "$(cat "$DIR/fsid")" \
    --addv a '[v2:127.0.0.1:16789,v1:127.0.0.1:16790]' "$DIR/monmap"
  ceph-mon -c "$CONF" --mkfs -i a --monmap "$DIR/monmap" --keyring "$DIR/keyring"
  touch "$DIR/mon/done"
}

make_device() {
  [ ! -e "$DIR/osd/done" ] || return 0
  local uuid; uuid=$(cat /proc/sys/kernel/random/uuid)
  rm -rf "$DIR/osd"; mkdir -p "$DIR/osd"
  ceph -c "$CONF" osd new "$uuid" 0
  ceph-osd -c "$CONF" -i 0 --mkfs --osd-uuid "$uuid"
  touch "$DIR/osd/done"
}

start() {
  configure
  make_monitor
  alive "$DIR/run/mon.pid" ceph-mon || launch ceph-mon -c "$CONF" -i a
  wait_for 30 ceph-mon timeout 5 ceph -c "$CONF" mon stat
  make_device
  alive "$DIR/run/osd.pid" ceph-osd || launch ceph-osd -c "$CONF" -i 0
  wait_for 30 ceph-osd sh -c "timeout 5 ceph -c $CONF osd stat | grep -q '1 up'"
  if ! alive "$DIR/run/client.pid" radosgw || ! answers; then
    stop "$DIR/run/client.pid" radosgw
    launch radosgw -c "$CONF" -n client.rgw.a
    wait_for 60 radosgw answers
  fi
  radosgw-admin -c "$CONF" user info --uid=test ||
    radosgw-admin -c "$CONF" user create --uid=test --display-name=test --access-key=$KEY --secret-key=$SECRET
}

down() {
  stop "$DIR/run/client.pid" radosgw
  stop "$DIR/run/osd.pid" ceph-osd
  stop "$DIR/run/mon.pid" ceph-mon
}

status() {
  local daemon rc=0
  for daemon in mon:ceph-mon osd:ceph-osd client:radosgw; do
    if alive "$DIR/run/${daemon%%:*}.pid" "${daemon#*:}"; then say "${daemon#*:} runs"
    else say "${daemon#*:} does not run"; rc=1; fi
  done
  answers || rc=1
  return $rc
}

environment() {
  echo "export AWS_ENDPOINT_URL=http://127.0.0.1:$PORT AWS_ACCESS_KEY_ID=$KEY AWS_SECRET_ACCESS_KEY=$SECRET AWS_DEFAULT_REGION=us-east-1"
}

only_one
case ${1:-} in
  up)
    install ceph-mon:ceph-mon ceph-osd:ceph-osd radosgw:radosgw ceph-common:ceph curl:curl
    mkdir -p "$DIR/log"
    trap '[ $? = 0 ] || say "failed; logs are in $DIR/log"' EXIT
    { start; } >>"$DIR/log/up.log" 2>&1
    environment ;;
  status) status && environment ;;
  down) down ;;
  purge) down; rm -rf "$DIR" ;;
  kill-gateway) stop "$DIR/run/client.pid" radosgw KILL ;;
  *) die "usage: $0 up|status|down|purge|kill-gateway" ;;
esac
