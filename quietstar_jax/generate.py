"""Command line: placeholder"""
