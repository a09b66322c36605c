/* INFORMATION_SCHEMA.KEYWARD_KEYS.

   Debian's libmariadbd-dev has no header for this kind of plugin, whose
   interface is C++ structures of the server. The few of them needed are
   declared here with the layout of the 10.11 series (sql/sql_i_s.h,
   sql/table.h; offsets confirmed in the machine code of Debian's own plugins),
   and everything else is called by exported name. Three guards keep a wrong
   guess from hurting a server: another series does not get the table at all,
   a missing symbol neither, and before a row is stored the field objects are
   recognised by their class (read in a way that cannot crash).
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "infoschema.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* ---- what the server defines -------------------------------------------------- */

struct column { /* class ST_FIELD_INFO */
  const void *type_handler;
  unsigned char_length, unsigned_flag;
  const void *typelib;
  const char *name;
  size_t name_length;
  int nullable; /* 0: NOT NULL */
  const char *old_name;
  size_t old_name_length;
  int open_method;
};

struct schema_table { /* struct st_schema_table, as far as it is used */
  const char *name;
  struct column *columns;
  int (*reset)(void);
  int (*fill)(void *thd, void *table_list, void *condition);
};

#define TABLE_LIST_TABLE 0x108 /* offset of TABLE_LIST::table */
#define TABLE_FIELD 0xa8       /* offset of TABLE::field */
#define VTABLE_HEAD 16         /* an object points behind the head of its vtable */
#define PROCESS_ACL (1ULL << 8)

static struct {
  bool found;
  char (*store_row)(void *thd, void *table);
  int (*store_string)(void *field, const char *, size_t, const void *charset);
  int (*store_int)(void *field, long long, char is_unsigned);
  char (*check_access)(void *thd, unsigned long long privilege, char no_errors);
  const char *string_vtable, *int_vtable, *unused_vtable;
  const void *const *charset;
} server;

/* ---- columns ------------------------------------------------------------------- */

enum { KEY_ID, KEYRING, LATEST_VERSION, VERSIONS_HELD, VERSIONS, STATE, REFRESH_AGE, LAST_ERROR, COLUMNS };

static struct column columns[COLUMNS + 1];

static void column(int i, const char *name, const char *handler, unsigned length, bool is_unsigned) {
  columns[i].type_handler = dlsym(RTLD_DEFAULT, handler);
  columns[i].char_length = length;
  columns[i].unsigned_flag = is_unsigned;
  columns[i].name = name;
  columns[i].name_length = strlen(name);
}

static void define_columns(void) {
  static const char integer[] = "type_handler_ulonglong", text[] = "type_handler_varchar";
  column(KEY_ID, "KEY_ID", integer, 20, true);
  column(KEYRING, "KEYRING", text, 255, false);
  column(LATEST_VERSION, "LATEST_VERSION", integer, 20, true);
  column(VERSIONS_HELD, "VERSIONS_HELD", integer, 20, true);
  column(VERSIONS, "VERSIONS", text, 511, false);
  column(STATE, "STATE", text, 16, false);
  column(REFRESH_AGE, "REFRESH_AGE", integer, 20, true);
  column(LAST_ERROR, "LAST_ERROR", text, 1023, false);
  columns[COLUMNS].type_handler = columns[KEYRING].type_handler;
}

/* ---- finding the server's side ---------------------------------------------------- */

static const void *symbol(const char *name) {
  void *p = dlsym(RTLD_DEFAULT, name);
  if (!p)
    server.found = false;
  return p;
}

/* ISO C has no cast from object to function pointer. */
static void function(void *to, const char *name) {
  const void *p = symbol(name);
  memcpy(to, &p, sizeof p);
}

static void find_server(void) {
  server.found = true;
  function(&server.store_row, "_Z25schema_table_store_recordP3THDP5TABLE");
  function(&server.store_string, "_ZN15Field_varstring5storeEPKcmPK15charset_info_st");
  function(&server.store_int, "_ZN14Field_longlong5storeExb");
  function(&server.check_access, "_Z19check_global_accessP3THD11privilege_tb");
  server.string_vtable = symbol("_ZTV15Field_varstring");
  server.int_vtable = symbol("_ZTV14Field_longlong");
  server.unused_vtable = symbol("_ZTV12Field_string");
  server.charset = symbol("system_charset_info");
  symbol("type_handler_ulonglong");
  symbol("type_handler_varchar");
}

int kw_infoschema_version(void) {
  const char *version = dlsym(RTLD_DEFAULT, "server_version"); /* "10.11.19-MariaDB..." */
  unsigned major, minor, patch;
  if (!version || sscanf(version, "%u.%u.%u", &major, &minor, &patch) != 3)
    return 0;
  if (major != 10 || minor != 11 || patch > 99)
    return 0;
  find_server();
  return server.found ? (int)((major * 10000 + minor * 100 + patch) << 8) : 0;
}

/* ---- rows ---------------------------------------------------------------------------- */

/* Reads memory that may not be there: an error, not a crash. */
static bool peek(const void *from, void *to, size_t n) {
  struct iovec local = {to, n}, remote = {(void *)(uintptr_t)from, n};
  return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == (ssize_t)n;
}

/* The TABLE's field objects, or false if they are not of the classes that the
   columns must have. Columns a statement does not use are made CHAR(0): NULL
   in fields. */
static bool find_fields(const char *table_list, void **table, void *fields[COLUMNS]) {
  void **array;
  if (!peek(table_list + TABLE_LIST_TABLE, table, sizeof *table))
    return false;
  if (!peek((char *)*table + TABLE_FIELD, &array, sizeof array) || !peek(array, fields, COLUMNS * sizeof *fields))
    return false;
  for (int i = 0; i < COLUMNS; i++) {
    const char *vtable;
    if (!peek(fields[i], &vtable, sizeof vtable))
      return false;
    bool text = columns[i].type_handler == columns[KEYRING].type_handler;
    if (vtable == server.unused_vtable + VTABLE_HEAD)
      fields[i] = NULL;
    else if (vtable != (text ? server.string_vtable : server.int_vtable) + VTABLE_HEAD)
      return false;
  }
  return true;
}

static void text(void *field, const char *s) {
  if (field)
    server.store_string(field, s, strlen(s), *server.charset);
}

static void number(void *field, uint64_t n) {
  if (field)
    server.store_int(field, (long long)n, 1);
}

static const char *state_name(enum kw_state state) {
  switch (state) {
  case KW_STATE_ACTIVE: return "active";
  case KW_STATE_DENIED: return "denied";
  case KW_STATE_STALE: return "stale";
  default: return "unlisted";
  }
}

static int fill(void *thd, void *table_list, void *condition __attribute__((unused))) {
  void *table, *fields[COLUMNS];
  struct kw_session_status st;
  if (server.check_access(thd, PROCESS_ACL, 1))
    return 0;
  if (!find_fields(table_list, &table, fields)) {
    kw_log(KW_ERROR, "INFORMATION_SCHEMA.KEYWARD_KEYS: this server's tables look different; use SHOW STATUS LIKE 'Keyward%%'");
    return 1;
  }
  struct kw_row *row = malloc(sizeof *row);
  if (!row)
    return 1;
  kw_session_status(&st);
  int rc = 0;
  for (size_t i = 0; !rc && (i = kw_table_rows(i, row)) != 0;) {
    bool away = !st.connected && row->state != KW_STATE_DENIED;
    number(fields[KEY_ID], row->id);
    text(fields[KEYRING], row->keyring);
    number(fields[LATEST_VERSION], row->latest);
    number(fields[VERSIONS_HELD], row->held);
    text(fields[VERSIONS], row->versions);
    text(fields[STATE], away ? "unreachable" : state_name(row->state));
    number(fields[REFRESH_AGE], st.age_ms / 1000);
    text(fields[LAST_ERROR], away ? st.last_error : row->error);
    rc = server.store_row(thd, table) != 0;
  }
  free(row);
  return rc;
}

/* FLUSH KEYWARD_KEYS */
static int reset(void) {
  struct kw_error e;
  if (!kw_session_refresh(&e))
    return 0;
  kw_tell_client(&e);
  return 1;
}

int kw_infoschema_init(void *schema_table) {
  struct schema_table *t = schema_table;
  define_columns();
  t->columns = columns;
  t->fill = fill;
  t->reset = reset;
  return 0;
}
