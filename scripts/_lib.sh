# What the scripts share. Sourced from the project's root folder, under `set -euo pipefail`.

# Numbers are read and written as in C, whatever this host's language is: a decimal comma is none.
[ -z "${LC_ALL:-}" ] || export LC_CTYPE=$LC_ALL LC_MESSAGES=$LC_ALL
unset LC_ALL
export LC_NUMERIC=C

# This host's own loopback is never asked for through a proxy.
if [ -n "${HTTP_PROXY:-}${HTTPS_PROXY:-}${ALL_PROXY:-}${http_proxy:-}${https_proxy:-}${all_proxy:-}" ] && [ "${no_proxy:-${NO_PROXY:-}}" != '*' ]; then
  no_proxy=${no_proxy:-${NO_PROXY:-}}
  export no_proxy=${no_proxy:+$no_proxy,}127.0.0.1,localhost,::1 NO_PROXY=${no_proxy:+$no_proxy,}127.0.0.1,localhost,::1
fi

fail() { # CODE HEADLINE FOUND FIX: an error a person can act on, then the end
  printf '%s  %s\n  found  %s\n  fix    %s\n  help   docs/troubleshooting.md#%s\n' "$1" "$2" "$3" "$4" "${1,,}" >&2
  exit 1
}

now() { local t=${EPOCHREALTIME:-$(date +%s%6N)}; echo "${t//[!0-9]/}"; } # in microseconds

step() { # NAME COMMAND...: run one named step, say how long it took, and note its seconds in $BOUQUET_TIMES
  local name=$1 begun tenths; begun=$(now); shift
  printf '%s: %s\n' "${0##*/}" "$name${ABOUT[$name]:+, ${ABOUT[$name]}}"
  [ -t 1 ] || tell_time "$name" # in a terminal the step shows its own progress
  "$@"
  stop_telling
  tenths=$((($(now) - begun) / 100000))
  [ "$tenths" -lt 10 ] || printf '%s: %s took %d s\n' "${0##*/}" "$name" $(((tenths + 5) / 10))
  [ -z "${BOUQUET_TIMES:-}" ] || printf '%s\t%d.%d\n' "$name" $((tenths / 10)) $((tenths % 10)) >>"$BOUQUET_TIMES"
}
declare -A ABOUT=() # what a step does, for people

ticker=
tell_time() { # NAME: from now on a line every ten seconds, until stop_telling or the end
  local never from=$SECONDS
  exec {never}<> <(:) # a pipe that nobody writes to: `read` waits for it without a child that would outlive us
  while read -r -t 10 -u "$never"; [ $? -gt 128 ] && kill -0 $$ 2>/dev/null; do
    printf '%s: %s, %d s so far\n' "${0##*/}" "$1" $((SECONDS - from))
  done &
  ticker=$!
  disown "$ticker"
  exec {never}>&-
  trap stop_telling EXIT
}
stop_telling() { [ -z "$ticker" ] || kill "$ticker" 2>/dev/null || :; ticker=; }

declare -A DOTENV=()
read_settings() { # .env, as Compose reads it
  local said key value
  DOTENV=()
  [ -e .env ] || return 0
  { [ -f .env ] && [ -r .env ]; } || fail HOST-14 ".env cannot be read." "$PWD/.env is no file that user $(id -un) may read" "ls -ld .env; chown or chmod it"
  said=$(LC_ALL=C awk -v file=.env -v mode=all -f scripts/_env.awk 2>&1) || fail HOST-14 ".env cannot be read." ".env, $said" \
    "correct that line; docker compose stops at it, too"
  while IFS='=' read -r key value; do
    [[ ! $key =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || printf -v "DOTENV[$key]" '%b' "$value"
  done <<<"$said"
}

setting() { # KEY [DEFAULT]: the environment's value, else .env's; where that is empty, the default
  local value=${DOTENV[$1]:-}
  [ -z "${!1+set}" ] || value=${!1}
  printf '%s\n' "${value:-${2:-}}"
}

quoted() { # VALUE: as it stands in .env, so that Compose reads VALUE
  local text
  case $1 in
    *[\'\\]* | *$'\n'*)
      text=${1//\\/\\\\}; text=${text//\"/\\\"}; text=${text//\$/\\\$}
      printf '"%s"' "${text//$'\n'/\\n}" ;;
    *[!A-Za-z0-9_./:@%+,=~-]*) printf "'%s'" "$1" ;;
    *) printf '%s' "$1" ;;
  esac
}

keep() { # KEY VALUE: write KEY to .env unless it is there already (what a person wrote stays)
  [ -n "${DOTENV[$1]+set}" ] || put "$1" "$2"
}

put() { # KEY VALUE: write KEY to .env in place of what was there, in one step
  touch .env
  cp -p .env .env.new # for its owner and mode
  sed "/^[[:space:]]*\(export[[:space:]]\{1,\}\)\{0,1\}$1[[:space:]]*[=:]/d" .env >.env.new
  [ -z "$(tail -c 1 .env.new)" ] || echo >>.env.new # a last line that was not ended
  printf '%s=%s\n' "$1" "$(quoted "$2")" >>.env.new
  mv .env.new .env
  DOTENV[$1]=$2
}

folder() { # DIR as a person writes it: ~ is the home
  case $1 in '~') echo "$HOME" ;; '~/'*) echo "$HOME/${1#\~/}" ;; *) echo "$1" ;; esac
}

hosts() { # TEXT: its names and addresses, one a line, however they are divided; in brackets or not. Errors: CERT-05
  local host words named='^[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*$'
  local digits='^[0-9.]+$' octet='(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])'
  read -rd '' -a words <<<"${1//[,;]/ }" || :
  for host in "${words[@]}"; do
    if [[ $host == *:* ]]; then
      [[ $host != \[*\] ]] || host=${host:1:-1}
      [[ $host =~ ^[0-9A-Fa-f:]+[0-9.]*$ && $host != *:::* && ( $host == *::* || ${host//[!:]/} == ::::::: ) ]] || bad_host "$host"
    elif [[ $host =~ $digits ]]; then [[ $host =~ ^$octet\.$octet\.$octet\.$octet$ ]] || bad_host "$host"
    else [[ $host =~ $named ]] || bad_host "$host"
    fi
    printf '%s\n' "$host"
  done
}
bad_host() {
  fail CERT-05 "That is no name of the hub." "HUB_HOST has $1" \
    "names or addresses only, with a space or a comma between, no https:// and no port: HUB_HOST=\"hub.example.org 192.0.2.7\""
}

container_user() { # uid:gid of the containers: this user, or 10001 when this user is root
  [ "$(id -u)" = 0 ] && echo 10001:10001 || echo "$(id -u):$(id -g)"
}

has() { command -v "$1" >/dev/null 2>&1; }
docker_answers() { has docker && docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1; }
gpus() { { has nvidia-smi && nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true; }
torch() { setting TORCH "$([ "$(gpus)" -gt 0 ] && echo cuda || echo cpu)"; }
image() { # IMAGE where it is set; else every Compose project has its own, so that no clone runs another one's code
  local project; project=$(setting COMPOSE_PROJECT_NAME)
  setting IMAGE "${project:-$(scripts/_project 2>/dev/null || echo bouquet)}:$(torch)"
}
is_port() { [[ $1 =~ ^[0-9]{1,5}$ ]] && [ "$1" -gt 0 ] && [ "$1" -lt 65536 ]; }
is_one_gpu() { [[ $1 =~ ^([0-9]+|(GPU|MIG)-[0-9A-Za-z/-]+|none)$ ]]; }

find_python() { # one that fits, as PYTHON
  local candidate
  for candidate in ${PYTHON:-} .venv/bin/python python3 python3.13 python3.12 python3.11; do
    "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { PYTHON=$candidate; return; }
  done
  return 1
}

read_settings
