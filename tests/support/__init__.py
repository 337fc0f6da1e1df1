"""Servers, proxies and volumes that tests start for themselves."""
