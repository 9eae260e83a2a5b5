# Reads .env as Docker Compose does, for every program here: the scripts, the site's kit, and Python (bouquet/dotenv.py).
#
#   LC_ALL=C awk -v file=.env -v mode=all|sh -f scripts/_env.awk
#
# all: a line KEY=VALUE for each setting of the file, `\` and line ends in it as `\\`, `\n` and `\r`
# sh:  KEY='VALUE' for a shell to evaluate; what the environment sets already is left out, as Compose prefers that
#
# The rules: the last of two lines counts; `export`, spaces round = and CRLF are no part of a value; " #" begins a comment outside
# of quotes; '…' is taken as it stands (\' is '), "…" knows \n \t \\ \" \$; $NAME, ${NAME}, ${NAME:-x}, ${NAME:+x}, ${NAME:?x} stand
# for a variable of the environment, else of a line above, but not in '…'; $$ is $. tests/test_env.py holds them against Compose.
# Errors: exit code 2 and on stderr the line that no reader takes and why.

BEGIN {
  while ((getline text < file) > 0) src = src text "\n"
  if (substr(src, 1, 3) == "\357\273\277") src = substr(src, 4)
  at = 1
  while (skip_to_statement()) statement()
  for (i = 1; i <= count; i++) show(names[i], values[names[i]])
}

function skip_to_statement() { # over white space and comments; whether anything is left
  while (match(substr(src, at), /^[ \t\v\f\r\n]*#[^\n]*\n/)) at += RLENGTH
  if (match(substr(src, at), /^[ \t\v\f\r\n]+/)) at += RLENGTH
  if (substr(src, at, 1) == "#") return skip_to_statement()
  return at <= length(src)
}

function statement(    key, c, start) {
  if (match(substr(src, at), /^export[ \t\v\f\r\n]+/)) at += RLENGTH
  start = at
  while ((c = substr(src, at, 1)) != "=" && c != ":" && c != "\n" && c != "") {
    if (index("!\"#$%&'()*+,/;<>?@\\^`{|}~", c)) fail("a name has no " c " in it", start)
    at++
  }
  key = trim_right(substr(src, start, at - start))
  if (key == "") fail("no name before " c, start)
  if (key ~ /[ \t]/) fail("a name has no space in it", start)
  at++
  if (c == "=" || c == ":") keep(key, value_here())
  else if (key in ENVIRON) keep(key, ENVIRON[key])
}

function value_here(    quote) {
  if (match(substr(src, at), /^([ \t\v\f\r]|\302\240)+/)) at += RLENGTH
  quote = substr(src, at, 1)
  return quote == "'" || quote == "\"" ? quoted(quote) : plain()
}

function plain(    line, end) {
  end = index(substr(src, at), "\n")
  line = substr(src, at, end - 1)
  begun = at; at += end
  if (end = index(line, " #")) line = substr(line, 1, end - 1)
  return expanded(trim_right(line))
}

function quoted(quote,    c, escaped, got) {
  begun = at++
  for (; (c = substr(src, at, 1)) != ""; at++) {
    if (escaped) { got = got (c == quote ? "" : "\\") c; escaped = 0 }
    else if (c == "\\") escaped = 1
    else if (c == quote) { at++; return quote == "'" ? got : expanded(unescaped(got)) }
    else got = got c
  }
  fail("a quotation mark is not closed", begun)
}

function unescaped(text,    out, c, digits) { # what "…" knows
  while (c = index(text, "\\")) {
    out = out substr(text, 1, c - 1)
    text = substr(text, c + 1)
    c = substr(text, 1, 1)
    if (c == "0") {
      match(text, /^0[0-9]?[0-9]?[0-9]?/); digits = substr(text, 2, RLENGTH - 1); text = substr(text, RLENGTH + 1)
      out = out (digits ~ /^[0-3][0-7][0-7]$/ ? sprintf("%c", substr(digits, 1, 1) * 64 + substr(digits, 2, 1) * 8 + substr(digits, 3, 1)) : "\\" digits)
      continue
    }
    text = substr(text, 2)
    if (c == "$") out = out "$$"
    else if (c == "a") out = out "\a"
    else if (c == "b") out = out "\b"
    else if (c == "f") out = out "\f"
    else if (c == "n") out = out "\n"
    else if (c == "r") out = out "\r"
    else if (c == "t") out = out "\t"
    else if (c == "v") out = out "\v"
    else if (c == "\\") out = out "\\"
    else out = out "\\" c
  }
  return out text
}

function expanded(text,    out, p, name, rest, end) { # $NAME and ${NAME…}
  while (p = index(text, "$")) {
    out = out substr(text, 1, p - 1)
    rest = substr(text, p + 1)
    if (substr(rest, 1, 1) == "$") { out = out "$"; text = substr(rest, 2) }
    else if (match(rest, /^[A-Za-z_][A-Za-z0-9_]*/)) { out = out looked_up(substr(rest, 1, RLENGTH)); text = substr(rest, RLENGTH + 1) }
    else if (substr(rest, 1, 1) == "{") {
      end = closing(rest)
      if (!end) fail("${ is not closed, or has no name", begun)
      out = out braced(substr(rest, 2, end - 2)); text = substr(rest, end + 1)
    }
    else { out = out "$"; text = rest }
  }
  return out text
}

function closing(text,    i, c, depth) { # where the } is that closes the { at the beginning
  for (i = 1; (c = substr(text, i, 1)) != ""; i++) {
    if (c == "{" && (i == 1 || substr(text, i - 1, 1) == "$")) depth++
    if (c == "}" && !--depth) return i
  }
  return 0
}

function braced(text,    name, op, word, set) {
  if (!match(text, /^[A-Za-z_][A-Za-z0-9_]*/)) fail("${ is not closed, or has no name", begun)
  name = substr(text, 1, RLENGTH); word = substr(text, RLENGTH + 1)
  if (word == "") return looked_up(name)
  if (!match(word, /^:?[-+?]/)) fail("${" text "} is no variable", begun)
  op = substr(word, RLENGTH, 1)
  set = RLENGTH == 2 ? looked_up(name) != "" : (name in ENVIRON) || (name in values)
  word = substr(word, RLENGTH + 1)
  if (op == "+") return set ? expanded(word) : ""
  if (set) return looked_up(name)
  if (op == "?") fail("${" name "} is not set" (word == "" ? "" : ": " word), begun)
  return expanded(word)
}

function looked_up(name) { return name in ENVIRON ? ENVIRON[name] : name in values ? values[name] : "" }

function keep(key, value) {
  if (!(key in values)) names[++count] = key
  values[key] = value
}

function show(key, value) {
  if (mode != "sh") print key "=" replaced(replaced(replaced(value, "\\", "\\\\"), "\n", "\\n"), "\r", "\\r")
  else if (key ~ /^[A-Za-z_][A-Za-z0-9_]*$/ && !(key in ENVIRON)) print key "='" replaced(value, "'", "'\\''") "'"
}

function replaced(text, old, new,    out, p) {
  while (p = index(text, old)) { out = out substr(text, 1, p - 1) new; text = substr(text, p + 1) }
  return out text
}

function trim_right(text) { sub(/([ \t\v\f\r]|\302\240)+$/, "", text); return text }

function fail(why, where,    before) {
  before = substr(src, 1, where - 1)
  print "line " gsub(/\n/, "", before) + 1 ": " why > "/dev/stderr"
  failed = 1
  exit 2
}
