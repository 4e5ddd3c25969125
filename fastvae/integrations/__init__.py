"""Integrations with packages that people already use. Each module is named after its package.

Importing a module does not import its package; only calling its functions does.
"""
