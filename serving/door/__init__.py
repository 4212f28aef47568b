"""What stands before every server of this package: keys, host names and origins, bounds on what a client sends.

Uses nothing of the other rooms. Start with `keys`; `hosts` refuses other names and other sites, `protocol` bounds heads
and bodies, `strict_json` reads them, `refusals` writes the answers.
"""
