"""Tests of one module each: no server, no mount, no thread that outlives its test."""
