"""How clients reach a disk: its NBD socket, who may connect, a planned restart, and the FUSE mount."""
