# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

package PVE::INotify;

use strict;
use warnings;

sub nodename { return 'ham0' }

1;
