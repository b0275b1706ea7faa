"""The engines, one module (or package) each, with the same ops under the same names; ``choose`` picks one."""
