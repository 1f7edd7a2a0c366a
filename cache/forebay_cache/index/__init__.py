"""The index: LMDB tables that say what lies in which slot, and the checksums of slots."""
