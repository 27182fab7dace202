#!/usr/bin/env bash
# Chromium and its driver from Debian's packages, for the tests marked `browser`. Root. Half a minute.
#
#   tools/browser.sh up        install what is missing
#   tools/browser.sh status
set -euo pipefail
. "$(dirname "$0")/daemons.sh"

status() { say "$(chromium --version 2>/dev/null), $(chromedriver --version 2>/dev/null)"; }

case ${1:-} in
  up) only_one; install chromium:chromium chromium-driver:chromedriver; status ;;
  status) status ;;
  *) die "usage: $0 up|status" ;;
esac
