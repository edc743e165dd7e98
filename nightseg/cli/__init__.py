"""The command line: parse, validate, call one function, show the answer."""
