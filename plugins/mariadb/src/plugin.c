/* What the server sees: descriptors, system and status variables.
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "infoschema.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <my_global.h>
#include <typelib.h>
#include <mysql/plugin_encryption.h>
#include <mysql/service_encryption.h>
#include <mysql/service_my_print_error.h>
#include <mysqld_error.h>

#define DEFAULT_SOCKET "/run/keyward/agent.sock"
#define UNKNOWN_RETRY_MS 1000

struct kw_settings kw_settings;
struct kw_counters kw_counters;

/* ---- what the other files use ---------------------------------------------------- */

uint64_t kw_now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

enum kw_class kw_fail(struct kw_error *e, enum kw_class c, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(e->text, sizeof e->text, fmt, ap);
  va_end(ap);
  e->class = c;
  return c;
}

/* A server takes over the hook early on. mariadb-backup leaves it at its
   default, which drops what is meant for an error log alone; nor does it end
   plugins, so that a thread of ours would make its exit wait five seconds. */
typedef void message_handler(unsigned int, const char *, myf);
extern message_handler *error_handler_hook __attribute__((weak));
extern message_handler my_message_stderr __attribute__((weak));

static bool in_backup(void) {
  return &error_handler_hook && my_message_stderr && error_handler_hook == my_message_stderr;
}

/* The server cuts a message at 511 bytes and an agent's may be longer (it
   names key, version, endpoint and remedy): long ones get several lines. */
void kw_log(enum kw_level level, const char *fmt, ...) {
  static const unsigned long flags[] = {ME_NOTE, ME_WARNING, 0};
  char text[2816];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  const char *p = text, *lead = "";
  do {
    size_t n = strlen(p), cut = n;
    if (n > 440)
      for (cut = 440; cut > 300 && p[cut] != ' ';)
        cut--;
    char line[456];
    snprintf(line, sizeof line, "%.*s", (int)cut, p);
    if (in_backup())
      fprintf(stderr, "keyward: %s%s\n", lead, line);
    else
      my_printf_error(ER_UNKNOWN_ERROR, "keyward: %s%s", ME_ERROR_LOG_ONLY | flags[level], lead, line);
    p += cut;
    lead = "...";
  } while (*p);
}

void kw_tell_client(const struct kw_error *e) {
  kw_log(KW_WARN, "%s", e->text);
  my_printf_error(ER_UNKNOWN_ERROR, "keyward: %.400s", MYF(0), e->text);
}

/* ---- key functions ------------------------------------------------------------------ */

/* Of an id never listed. A backup has no refresher and asks the agent itself,
   at most once a second; a server never waits here, whatever locks it holds:
   its refresher learns of a new id by itself. */
static uint32_t unknown_id(uint32_t id) {
  static _Atomic uint64_t next;
  struct kw_error e;
  uint64_t now = kw_now_ms(), due = atomic_load(&next);
  if (in_backup() && now >= due && atomic_compare_exchange_strong(&next, &due, now + UNKNOWN_RETRY_MS))
    kw_session_refresh(&e);
  uint32_t v = kw_table_latest(id);
  return v ? v : ENCRYPTION_KEY_VERSION_INVALID;
}

static unsigned int get_latest_key_version(unsigned int id) {
  uint32_t v = kw_table_latest(id);
  return v ? v : unknown_id(id);
}

/* Once a second at most: a scan of an unreadable table must not fill a disk. */
static void log_failure(uint32_t id, uint32_t version, const struct kw_error *e) {
  static _Atomic uint64_t next;
  uint64_t now = kw_now_ms(), due = atomic_load(&next);
  KW_COUNT(key_failures);
  if (now >= due && atomic_compare_exchange_strong(&next, &due, now + 1000))
    kw_log(KW_ERROR, "key id %u version %u: %s", id, version, e->text);
}

/* Every failure is VERSION_INVALID: InnoDB takes any other error of a
   decryption as a reason to abort (storage/innobase/fil/fil0crypt.cc). */
static unsigned int get_key(unsigned int id, unsigned int version, unsigned char *key, unsigned int *length) {
  struct kw_error e;
  e.text[0] = 0;
  KW_COUNT(key_requests);
  if (version == ENCRYPTION_KEY_NOT_ENCRYPTED || version == ENCRYPTION_KEY_VERSION_INVALID)
    return ENCRYPTION_KEY_VERSION_INVALID;
  bool small = *length < KW_KEY_SIZE;
  uint8_t *to = key && !small ? key : NULL;
  if (!kw_table_key(id, version, to)) {
    KW_COUNT(key_misses);
    if (kw_session_fetch(id, version, &e) != KW_OK || !kw_table_key(id, version, to)) {
      log_failure(id, version, &e);
      return ENCRYPTION_KEY_VERSION_INVALID;
    }
  }
  kw_table_used(id, version);
  *length = KW_KEY_SIZE;
  return small ? ENCRYPTION_KEY_BUFFER_TOO_SMALL : 0;
}

static struct st_mariadb_encryption descriptor = {
    MariaDB_ENCRYPTION_INTERFACE_VERSION,
    get_latest_key_version,
    get_key,
    kw_crypt_ctx_size,
    kw_crypt_ctx_init,
    kw_crypt_ctx_update,
    kw_crypt_ctx_finish,
    kw_crypt_length,
};

/* ---- system variables ------------------------------------------------------------------ */

static struct {
  char *socket, *instance;
  double timeout, start_timeout, revoke_grace; /* seconds */
  unsigned long cipher, on_revoke;
  char require_old_keys, refresh;
} var;

static const char *cipher_names[] = {"ctr", "cbc", NULL};
static TYPELIB ciphers = {2, "", cipher_names, NULL};
static const char *on_revoke_names[] = {"keep", "shutdown", NULL};
static TYPELIB on_revokes = {2, "", on_revoke_names, NULL};

static uint32_t to_ms(double seconds) { return (uint32_t)(seconds * 1000); }

static void apply_settings(void) {
  atomic_store(&kw_settings.timeout_ms, to_ms(var.timeout));
  atomic_store(&kw_settings.start_timeout_ms, to_ms(var.start_timeout));
  atomic_store(&kw_settings.revoke_grace_ms, to_ms(var.revoke_grace));
  atomic_store(&kw_settings.on_revoke, (int)var.on_revoke);
}

static void update_double(MYSQL_THD thd __attribute__((unused)), struct st_mysql_sys_var *v __attribute__((unused)), void *to, const void *from) {
  *(double *)to = *(const double *)from;
  apply_settings();
}

static void update_enum(MYSQL_THD thd __attribute__((unused)), struct st_mysql_sys_var *v __attribute__((unused)), void *to, const void *from) {
  *(unsigned long *)to = *(const unsigned long *)from;
  apply_settings();
}

/* Asks the agent while the value is checked: the server updates a variable
   under a lock that new connections need, too. */
static int check_refresh(MYSQL_THD thd __attribute__((unused)), struct st_mysql_sys_var *v __attribute__((unused)), void *save, struct st_mysql_value *value) {
  struct kw_error e;
  long long on = 0;
  char text[8];
  int size = sizeof text;
  *(char *)save = 0;
  if (value->value_type(value) == MYSQL_VALUE_TYPE_STRING) {
    const char *s = value->val_str(value, text, &size);
    on = s && (strcasecmp(s, "ON") == 0 || strcasecmp(s, "TRUE") == 0);
    if (!s || (!on && strcasecmp(s, "OFF") != 0 && strcasecmp(s, "FALSE") != 0))
      return 1;
  } else if (value->val_int(value, &on) || on < 0 || on > 1)
    return 1;
  if (on == 0 || kw_session_refresh(&e) == KW_OK)
    return 0;
  kw_tell_client(&e);
  return 1;
}

static void update_refresh(MYSQL_THD thd __attribute__((unused)), struct st_mysql_sys_var *v __attribute__((unused)), void *to __attribute__((unused)), const void *from __attribute__((unused))) {}

static MYSQL_SYSVAR_STR(socket, var.socket, PLUGIN_VAR_RQCMDARG | PLUGIN_VAR_READONLY, "Path of the Keyward agent's socket", NULL, NULL, DEFAULT_SOCKET);
static MYSQL_SYSVAR_STR(instance, var.instance, PLUGIN_VAR_RQCMDARG | PLUGIN_VAR_READONLY, "Name under which this server is registered; empty: the one that belongs to the server's account", NULL, NULL, "");
static MYSQL_SYSVAR_DOUBLE(timeout, var.timeout, PLUGIN_VAR_RQCMDARG, "Seconds that one answer of the agent may take", NULL, update_double, 3, 0.1, 60, 0);
static MYSQL_SYSVAR_DOUBLE(start_timeout, var.start_timeout, PLUGIN_VAR_RQCMDARG | PLUGIN_VAR_READONLY, "Seconds that a server start keeps trying while the agent or the KMS cannot be reached", NULL, NULL, 30, 0, 3600, 0);
static MYSQL_SYSVAR_ENUM(cipher, var.cipher, PLUGIN_VAR_RQCMDARG | PLUGIN_VAR_READONLY, "ctr (AES-CTR, AES-GCM for temporary files) or cbc; must stay what the data was written with", NULL, NULL, KW_CTR, &ciphers);
static MYSQL_SYSVAR_ENUM(on_revoke, var.on_revoke, PLUGIN_VAR_RQCMDARG, "When the KMS denies access to a key in use: keep (go on with the keys held) or shutdown (cleanly, after keyward_revoke_grace)", NULL, update_enum, KW_KEEP, &on_revokes);
static MYSQL_SYSVAR_DOUBLE(revoke_grace, var.revoke_grace, PLUGIN_VAR_RQCMDARG, "Seconds between a denial and the shutdown that keyward_on_revoke=shutdown asks for", NULL, update_double, 0, 0, 2592000, 0);
static MYSQL_SYSVAR_BOOL(require_old_keys, var.require_old_keys, PLUGIN_VAR_OPCMDARG | PLUGIN_VAR_READONLY, "Refuse to start without an old key version that the KMS refuses; OFF if nothing is encrypted with it any more", NULL, NULL, 1);
static MYSQL_SYSVAR_BOOL(refresh, var.refresh, PLUGIN_VAR_OPCMDARG, "SET GLOBAL keyward_refresh=1 asks the agent for changes now; always reads OFF", check_refresh, update_refresh, 0);

static struct st_mysql_sys_var *system_variables[] = {
    MYSQL_SYSVAR(socket),   MYSQL_SYSVAR(instance),     MYSQL_SYSVAR(timeout), MYSQL_SYSVAR(start_timeout), MYSQL_SYSVAR(cipher),
    MYSQL_SYSVAR(on_revoke), MYSQL_SYSVAR(revoke_grace), MYSQL_SYSVAR(refresh),
    MYSQL_SYSVAR(require_old_keys), NULL,
};

/* ---- status variables -------------------------------------------------------------------- */

/* A function per computed value; buff is of the server, SHOW_VAR_FUNC_BUFF_SIZE. */
#define SHOW(fn) static int fn(MYSQL_THD thd __attribute__((unused)), struct st_mysql_show_var *v, void *buff, struct system_status_var *sv __attribute__((unused)), enum enum_var_type t __attribute__((unused)))

static int show_number(struct st_mysql_show_var *v, void *buff, unsigned long long n) {
  memcpy(buff, &n, sizeof n);
  v->type = SHOW_ULONGLONG;
  v->value = buff;
  return 0;
}

static int show_text(struct st_mysql_show_var *v, void *buff, const char *s) {
  snprintf(buff, SHOW_VAR_FUNC_BUFF_SIZE, "%s", s);
  v->type = SHOW_CHAR;
  v->value = buff;
  return 0;
}

static uint32_t total(int which) {
  uint32_t t[3];
  kw_table_totals(&t[0], &t[1], &t[2]);
  return t[which];
}

SHOW(show_ids) { return show_number(v, buff, total(0)); }
SHOW(show_keys) { return show_number(v, buff, total(1)); }
SHOW(show_denied) { return show_number(v, buff, total(2)); }

SHOW(show_connected) {
  struct kw_session_status s;
  kw_session_status(&s);
  return show_text(v, buff, s.connected ? "ON" : "OFF");
}

SHOW(show_age) {
  struct kw_session_status s;
  kw_session_status(&s);
  return show_number(v, buff, s.age_ms / 1000);
}

SHOW(show_endpoints) {
  struct kw_session_status s;
  kw_session_status(&s);
  return show_text(v, buff, s.endpoints);
}

SHOW(show_instance) {
  struct kw_session_status s;
  kw_session_status(&s);
  return show_text(v, buff, s.instance);
}

SHOW(show_error) {
  struct kw_session_status s;
  kw_session_status(&s);
  return show_text(v, buff, s.last_error);
}

#define COUNTER(label, field) {label, (void *)&kw_counters.field, SHOW_ULONGLONG}
#define COMPUTED(label, fn) {label, (void *)fn, SHOW_FUNC}

static struct st_mysql_show_var status_variables[] = {
    COMPUTED("Keyward_connected", show_connected),
    COMPUTED("Keyward_denied_key_ids", show_denied),
    COMPUTED("Keyward_endpoints", show_endpoints),
    COMPUTED("Keyward_instance", show_instance),
    COMPUTED("Keyward_key_ids", show_ids),
    COMPUTED("Keyward_keys_held", show_keys),
    COMPUTED("Keyward_last_error", show_error),
    COMPUTED("Keyward_refresh_age", show_age),
    COUNTER("Keyward_agent_connects", connects),
    COUNTER("Keyward_key_failures", key_failures),
    COUNTER("Keyward_key_misses", key_misses),
    COUNTER("Keyward_key_requests", key_requests),
    COUNTER("Keyward_reencryption_wakeups", pokes),
    COUNTER("Keyward_refresh_failures", refresh_failures),
    COUNTER("Keyward_refreshes", refreshes),
    COUNTER("Keyward_rolls", rolls),
    COUNTER("Keyward_unlocked_pages", unlocked_pages),
    {NULL, NULL, SHOW_UNDEF},
};

/* ---- start and end ---------------------------------------------------------------------------- */

static void end(void) {
  kw_threads_stop();
  kw_session_close();
  kw_crypt_destroy();
  kw_table_destroy();
}

static int refuse(const struct kw_error *e) {
  if (e->class >= KW_TRANSPORT)
    kw_log(KW_ERROR, "cannot start: %s. Is keyward-agent running (systemctl status keyward-agent), is the path right (keyward_socket), and may this account (uid %u) use it?", e->text, (unsigned)geteuid());
  else
    kw_log(KW_ERROR, "cannot start: %s", e->text);
  end();
  return 1;
}

static int init(void *p __attribute__((unused))) {
  struct kw_error e;
  kw_settings.socket_path = var.socket && *var.socket ? var.socket : DEFAULT_SOCKET;
  kw_settings.instance = var.instance ? var.instance : "";
  kw_settings.cipher = (enum kw_cipher)var.cipher;
  kw_settings.require_old_keys = var.require_old_keys;
  apply_settings();
  if (!kw_crypt_init(&e) || kw_session_start(&e) != KW_OK)
    return refuse(&e);
  /* a backup asks when it meets a version it does not hold */
  if (!in_backup() && !kw_threads_start()) {
    kw_fail(&e, KW_INTERNAL, "no thread could be started");
    return refuse(&e);
  }
  uint32_t ids, keys, denied;
  struct kw_session_status s;
  kw_table_totals(&ids, &keys, &denied);
  kw_session_status(&s);
  kw_log(KW_NOTE, "instance %s: %u keys of %u key ids from %s", s.instance, keys, ids, s.endpoints);
  if (atomic_load(&kw_counters.unlocked_pages))
    kw_log(KW_WARN, "keys lie in memory that could not be locked and may reach swap: raise the limit (LimitMEMLOCK, ulimit -l)");
  return 0;
}

static int deinit(void *p __attribute__((unused))) {
  end();
  return 0;
}

static struct st_mysql_information_schema infoschema;

#pragma GCC visibility push(default)
maria_declare_plugin(keyward)
{
  MariaDB_ENCRYPTION_PLUGIN, &descriptor, "keyward", "The Keyward Authors",
  "Keys from a hardware security module through the Keyward agent",
  PLUGIN_LICENSE_GPL, init, deinit, 0x0100, status_variables, system_variables,
  "1.0", MariaDB_PLUGIN_MATURITY_STABLE
},
{
  MYSQL_INFORMATION_SCHEMA_PLUGIN, &infoschema, "KEYWARD_KEYS", "The Keyward Authors",
  "Key ids and versions that the keyward plugin holds",
  PLUGIN_LICENSE_GPL, kw_infoschema_init, NULL, 0x0100, NULL, NULL,
  "1.0", MariaDB_PLUGIN_MATURITY_STABLE
}
maria_declare_plugin_end;
#pragma GCC visibility pop

/* Runs before the server looks at the declarations. Where the table cannot be
   offered the list ends early, so that the keys are there in any case: a
   server that refuses one plugin of a library refuses them all. */
__attribute__((constructor)) static void adapt_to_server(void) {
  infoschema.interface_version = kw_infoschema_version();
  if (infoschema.interface_version == 0)
    memset(&_maria_plugin_declarations_[1], 0, sizeof _maria_plugin_declarations_[1]);
}
