"""Tables of URLs and captions, as their publishers write them, in one schema.

==========  ==================================================================
`schema`    the one schema
`layouts`   which column of which source becomes which field: a table
`columns`   casting, since mirrors differ in types
`keys`      8-byte keys of URLs and captions, 16-byte uids
`kernels`   Arrow's functions
`read`      a file -> Arrow record batches
==========  ==================================================================

Importing this package imports nothing else.
"""
