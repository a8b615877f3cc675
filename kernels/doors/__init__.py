"""The same kernels under other people's names. A door needs the library that it opens into, and is imported by itself."""
