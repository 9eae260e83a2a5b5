"""`health.py URL [CA]`: exit 0 when URL answers 200 over HTTP, or over TLS verified against the CA file."""

import ssl
import sys
import urllib.request

tls = ssl.create_default_context(cafile=sys.argv[2]) if len(sys.argv) > 2 else None
urllib.request.urlopen(sys.argv[1], timeout=5, context=tls)
