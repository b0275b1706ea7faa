"""The engines, one module (or package) each, with the same rooms under the same names; ``choose`` picks one."""
