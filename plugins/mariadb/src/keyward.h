/* Keyward encryption plugin for MariaDB: what its source files share.
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KEYWARD_H
#define KEYWARD_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

/* Bytes of a data key: AES-256. */
#define KW_KEY_SIZE 32

/* ---- errors ------------------------------------------------------------ */

/* 1..5 come from the agent (connector/PROTOCOL.md), the others are ours. */
enum kw_class {
  KW_OK = 0,
  KW_INVALID = 1,
  KW_DENIED = 2,
  KW_UNAVAILABLE = 3, /* the agent is there, the KMS behind it is not */
  KW_NOT_FOUND = 4,
  KW_INTERNAL = 5,
  KW_TRANSPORT = 100, /* the agent's socket cannot be reached or was closed */
  KW_TIMEOUT = 101,   /* the agent did not answer before the deadline */
  KW_PROTOCOL = 102,  /* the agent answered nonsense; the connection is closed */
  KW_CANCELLED = 103  /* the server is shutting down */
};

struct kw_error {
  enum kw_class class;
  char text[2304]; /* printable, ends in 0; an agent's has 2,048 at most */
};

enum kw_class kw_fail(struct kw_error *e, enum kw_class c, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* ---- time -------------------------------------------------------------- */

/* Milliseconds of CLOCK_MONOTONIC. */
uint64_t kw_now_ms(void);

/* ---- log (mariadbd's error log) ---------------------------------------- */

enum kw_level { KW_NOTE, KW_WARN, KW_ERROR };
void kw_log(enum kw_level level, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* Fails the statement of the calling thread with e, and logs it. */
void kw_tell_client(const struct kw_error *e);

/* ---- settings and counters --------------------------------------------- */

enum kw_cipher { KW_CTR = 0, KW_CBC = 1 };
enum kw_on_revoke { KW_KEEP = 0, KW_SHUTDOWN = 1 };

struct kw_settings {
  const char *socket_path;
  const char *instance;
  _Atomic uint32_t timeout_ms;       /* one answer of the agent */
  _Atomic uint32_t start_timeout_ms; /* all attempts of a server start */
  _Atomic uint32_t revoke_grace_ms;
  _Atomic int on_revoke; /* enum kw_on_revoke */
  bool require_old_keys;
  enum kw_cipher cipher;
};
extern struct kw_settings kw_settings;

/* Shown as status variables; written with relaxed atomics, read by the server
   as plain aligned 64-bit words. */
struct kw_counters {
  _Atomic unsigned long long refreshes;        /* successful LIST rounds */
  _Atomic unsigned long long refresh_failures; /* failed ones */
  _Atomic unsigned long long connects;         /* connections made to the agent */
  _Atomic unsigned long long key_requests;     /* get_key calls of the server */
  _Atomic unsigned long long key_misses;       /* ... that had to ask the agent */
  _Atomic unsigned long long key_failures;     /* ... that ended without a key */
  _Atomic unsigned long long rolls;            /* new current versions announced */
  _Atomic unsigned long long pokes;            /* re-encryption woken */
  _Atomic unsigned long long unlocked_pages;   /* key pages mlock refused */
};
extern struct kw_counters kw_counters;

#define KW_COUNT(name) \
  ((void)atomic_fetch_add_explicit(&kw_counters.name, 1, memory_order_relaxed))

/* ---- table of keys ----------------------------------------------------- */

enum kw_state {
  KW_STATE_ACTIVE = 1,
  KW_STATE_DENIED = 2,
  KW_STATE_STALE = 3,   /* agent: KMS unreachable */
  KW_STATE_UNLISTED = 4 /* ours: the agent no longer lists it */
};

/* One key id as the INFORMATION_SCHEMA shows it. */
struct kw_row {
  uint32_t id, latest, held;
  enum kw_state state;
  char keyring[256];
  char versions[512]; /* "1,3,5"; ends in "..." when cut */
  char error[1024];
};

/* A key version that the agent lists and this process does not hold yet. */
struct kw_want {
  uint32_t id, version;
  bool current; /* it is the newest of its key id */
};

/* A use of a key version, for REPORT. */
struct kw_use {
  uint32_t id, version;
  uint64_t unix_seconds;
};

struct kw_list_entry;

void kw_table_destroy(void); /* wipes every key */

/* The newest announced version of id, 0 if id was never resolved. Never
   blocks: one atomic load for ids below KW_DIRECT_IDS, a lock-free probe
   above. A value, once given, never falls back to 0 or to a lower one. */
#define KW_DIRECT_IDS 1024
uint32_t kw_table_latest(uint32_t id);

/* Copies the key to out and returns true if it is held. out may be NULL. */
bool kw_table_key(uint32_t id, uint32_t version, uint8_t out[KW_KEY_SIZE]);
void kw_table_used(uint32_t id, uint32_t version);

/* Notes what a LIST said. Never announces anything. */
void kw_table_generation(uint64_t generation);
bool kw_table_note(const struct kw_list_entry *e, uint64_t round);
void kw_table_unlisted(uint64_t round); /* ids not in this round */

/* Puts a key in locked memory; announces it when it is the newest listed
   version of its id. *rolled is set when that replaced an announced one. */
bool kw_table_put(uint32_t id, uint32_t version,
                  const uint8_t key[KW_KEY_SIZE], bool *rolled);

/* Notes why a version could not be had. One that was refused (denied, not
   found) is not wanted again before the agent's generation changes. */
void kw_table_error(uint32_t id, uint32_t version, const struct kw_error *e);
void kw_table_deny_all(const char *text); /* the instance itself was refused */

/* Up to max versions that are listed and not held, current ones first. With
   denied=false those of denied key ids are left out. */
size_t kw_table_wanted(struct kw_want *out, size_t max, bool denied);
size_t kw_table_uses(struct kw_use *out, size_t max); /* since the last call */
size_t kw_table_rows(size_t index, struct kw_row *out); /* 0 = no more, else next index */
void kw_table_totals(uint32_t *ids, uint32_t *keys, uint32_t *denied);

/* ---- locked memory ------------------------------------------------------ */

/* Memory that is locked, left out of core dumps and zero in a forked child;
   NULL when there is none. It is given back by kw_arena_destroy alone, which
   wipes it. bytes <= 4096. */
uint8_t *kw_arena_take(size_t bytes);
void kw_arena_destroy(void);

/* ---- session with the agent (refresh.c) --------------------------------- */

/* Cold start: HELLO, LIST and every current key, retried until the start
   timeout while the agent or KMS is unreachable. */
enum kw_class kw_session_start(struct kw_error *e);
bool kw_threads_start(void);
void kw_threads_stop(void);
void kw_session_close(void);

/* Fetches one version on the second connection; returns within the timeout. */
enum kw_class kw_session_fetch(uint32_t id, uint32_t version, struct kw_error *e);
/* A refresh now, by the caller; returns within four timeouts. */
enum kw_class kw_session_refresh(struct kw_error *e);

struct kw_session_status {
  bool connected;
  uint64_t age_ms; /* since the last successful refresh */
  char endpoints[512], instance[256], last_error[1024]; /* cut if longer */
};
void kw_session_status(struct kw_session_status *s);

/* ---- re-encryption wake-up (poke.c) ------------------------------------- */

bool kw_poke_start(void);
void kw_poke(void); /* asks for one; never blocks */
void kw_poke_stop(void);

/* ---- crypt functions (crypt.c) ------------------------------------------ */

bool kw_crypt_init(struct kw_error *e);
void kw_crypt_destroy(void); /* wipes every cached cipher context */
unsigned int kw_crypt_ctx_size(unsigned int id, unsigned int version);
int kw_crypt_ctx_init(void *ctx, const unsigned char *key, unsigned int klen,
                      const unsigned char *iv, unsigned int ivlen, int flags,
                      unsigned int id, unsigned int version);
int kw_crypt_ctx_update(void *ctx, const unsigned char *src, unsigned int slen,
                        unsigned char *dst, unsigned int *dlen);
int kw_crypt_ctx_finish(void *ctx, unsigned char *dst, unsigned int *dlen);
unsigned int kw_crypt_length(unsigned int slen, unsigned int id,
                             unsigned int version);

#endif
