# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

package PVE::Storage;

use strict;
use warnings;

our $VERSION_OF_HOST = 15;

sub APIVER { return $VERSION_OF_HOST }

1;
