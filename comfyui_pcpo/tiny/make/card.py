"""Measures the embedded models."""

import argparse


def write_card(args: argparse.Namespace) -> None:
    raise NotImplementedError
