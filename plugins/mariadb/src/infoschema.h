/* INFORMATION_SCHEMA.KEYWARD_KEYS.
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KEYWARD_INFOSCHEMA_H
#define KEYWARD_INFOSCHEMA_H

#include "keyward.h"

/* The number a server checks before it loads an INFORMATION_SCHEMA plugin
   (MYSQL_VERSION_ID << 8), or 0 if the running server is not of a series whose
   table layout this file knows, or lacks what it needs. */
int kw_infoschema_version(void);

int kw_infoschema_init(void *schema_table);

#endif
