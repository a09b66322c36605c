/* The keys this process holds and what the agent lists. Entries are added and
   never removed: the server aborts, or silently stops its binlog, if a version
   it was told of has no key.
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#include "proto.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct version {
  uint32_t number;
  bool listed;       /* in the newest LIST */
  bool unreported;   /* used since the last REPORT */
  uint64_t used;     /* unix seconds, 0 never */
  uint64_t refused;  /* the agent's generation when it refused this one */
  const uint8_t *key; /* locked memory, NULL not held */
};

struct ring {
  uint32_t id;
  _Atomic uint32_t latest; /* announced to the server; 0 none yet */
  /* under table.mu */
  uint32_t listed_latest;
  enum kw_state state;
  uint64_t round;
  char keyring[256], error[1024];
  struct version *v; /* ascending */
  size_t n;
};

#define BUCKETS 8192 /* > 2 x the key ids that fit one LIST frame */
#define MAX_RINGS (BUCKETS / 2)

static _Atomic uint32_t direct[KW_DIRECT_IDS];
static _Atomic(struct ring *) buckets[BUCKETS];

static struct {
  pthread_mutex_t mu;
  size_t rings;
  uint64_t generation;
} table = {.mu = PTHREAD_MUTEX_INITIALIZER};

static size_t bucket(uint32_t id) { return (id * 2654435761u) >> 19; }

/* Lock-free: buckets are only ever filled, with rings that live to the end. */
static struct ring *find(uint32_t id) {
  for (size_t i = bucket(id);; i = (i + 1) % BUCKETS) {
    struct ring *r = atomic_load_explicit(&buckets[i], memory_order_acquire);
    if (!r || r->id == id)
      return r;
  }
}

uint32_t kw_table_latest(uint32_t id) {
  if (id < KW_DIRECT_IDS)
    return atomic_load_explicit(&direct[id], memory_order_acquire);
  struct ring *r = find(id);
  return r ? atomic_load_explicit(&r->latest, memory_order_acquire) : 0;
}

static struct ring *find_or_add(uint32_t id) {
  struct ring *r = find(id);
  if (r)
    return r;
  if (table.rings >= MAX_RINGS || !(r = calloc(1, sizeof *r)))
    return NULL;
  r->id = id;
  r->state = KW_STATE_UNLISTED;
  size_t i = bucket(id);
  while (atomic_load_explicit(&buckets[i], memory_order_relaxed))
    i = (i + 1) % BUCKETS;
  atomic_store_explicit(&buckets[i], r, memory_order_release);
  table.rings++;
  return r;
}

static struct version *find_version(struct ring *r, uint32_t number) {
  size_t lo = 0, hi = r->n;
  while (lo < hi) {
    size_t mid = (lo + hi) / 2;
    if (r->v[mid].number < number)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo < r->n && r->v[lo].number == number ? &r->v[lo] : NULL;
}

static struct version *add_version(struct ring *r, uint32_t number) {
  struct version *v = find_version(r, number);
  if (v)
    return v;
  v = realloc(r->v, (r->n + 1) * sizeof *v);
  if (!v)
    return NULL;
  r->v = v;
  size_t at = r->n;
  while (at > 0 && v[at - 1].number > number)
    at--;
  memmove(v + at + 1, v + at, (r->n - at) * sizeof *v);
  r->n++;
  v[at] = (struct version){.number = number};
  return &v[at];
}

bool kw_table_key(uint32_t id, uint32_t version, uint8_t out[KW_KEY_SIZE]) {
  pthread_mutex_lock(&table.mu);
  struct ring *r = find(id);
  struct version *v = r ? find_version(r, version) : NULL;
  bool held = v && v->key;
  if (held && out)
    memcpy(out, v->key, KW_KEY_SIZE);
  pthread_mutex_unlock(&table.mu);
  return held;
}

void kw_table_used(uint32_t id, uint32_t version) {
  pthread_mutex_lock(&table.mu);
  struct ring *r = find(id);
  struct version *v = r ? find_version(r, version) : NULL;
  if (v) {
    v->used = (uint64_t)time(NULL);
    v->unreported = true;
  }
  pthread_mutex_unlock(&table.mu);
}

static void note_state(struct ring *r, enum kw_state state, const char *error) {
  if (r->state == state)
    return;
  if (state == KW_STATE_DENIED)
    kw_log(KW_ERROR, "key id %u (keyring %s): access was denied; the server goes on with the versions it holds and gets no new one; a restart will be refused (keyward keyring status %s)", r->id, r->keyring, r->keyring);
  else if (r->state == KW_STATE_DENIED)
    kw_log(KW_NOTE, "key id %u (keyring %s): access is granted again", r->id, r->keyring);
  r->state = state;
  snprintf(r->error, sizeof r->error, "%.1023s", error);
}

static const char *state_error(enum kw_state state) {
  switch (state) {
  case KW_STATE_DENIED: return "access denied by the KMS";
  case KW_STATE_STALE: return "the agent cannot reach the KMS";
  default: return "";
  }
}

bool kw_table_note(const struct kw_list_entry *e, uint64_t round) {
  bool ok = false;
  pthread_mutex_lock(&table.mu);
  struct ring *r = find_or_add(e->id);
  if (r) {
    snprintf(r->keyring, sizeof r->keyring, "%s", e->keyring);
    note_state(r, e->state, state_error(e->state));
    r->round = round;
    /* a list that is behind what was announced must not lower it */
    if (e->latest > r->listed_latest)
      r->listed_latest = e->latest;
    for (size_t i = 0; i < r->n; i++)
      r->v[i].listed = false;
    ok = true;
    for (unsigned i = 0; i < e->count; i++) {
      struct version *v = add_version(r, kw_u32(e->versions + 4 * i));
      if (v)
        v->listed = true;
      else
        ok = false;
    }
  }
  pthread_mutex_unlock(&table.mu);
  return ok;
}

/* Calls f for every ring, under the lock. */
static void each(void (*f)(struct ring *, void *), void *arg) {
  pthread_mutex_lock(&table.mu);
  for (size_t i = 0; i < BUCKETS; i++) {
    struct ring *r = atomic_load_explicit(&buckets[i], memory_order_relaxed);
    if (r)
      f(r, arg);
  }
  pthread_mutex_unlock(&table.mu);
}

static void unlist(struct ring *r, void *round) {
  if (r->round < *(uint64_t *)round && r->state != KW_STATE_UNLISTED) {
    note_state(r, KW_STATE_UNLISTED, "the agent no longer lists this keyring");
    for (size_t i = 0; i < r->n; i++)
      r->v[i].listed = false;
  }
}

void kw_table_unlisted(uint64_t round) { each(unlist, &round); }

static void deny(struct ring *r, void *text) {
  note_state(r, KW_STATE_DENIED, text);
}

void kw_table_deny_all(const char *text) { each(deny, (void *)(uintptr_t)text); }

/* Announces the newest listed version once its key is here. */
static bool announce(struct ring *r) {
  uint32_t old = atomic_load_explicit(&r->latest, memory_order_relaxed);
  if (r->listed_latest <= old)
    return false;
  struct version *v = find_version(r, r->listed_latest);
  if (!v || !v->key)
    return false;
  atomic_store_explicit(&r->latest, v->number, memory_order_release);
  if (r->id < KW_DIRECT_IDS)
    atomic_store_explicit(&direct[r->id], v->number, memory_order_release);
  r->error[0] = 0;
  if (old == 0)
    return false;
  KW_COUNT(rolls);
  kw_log(KW_NOTE, "key id %u (keyring %s): version %u replaces %u", r->id, r->keyring, v->number, old);
  return true;
}

static bool store(struct version *v, const uint8_t key[KW_KEY_SIZE]) {
  if (v->key) /* the first one stays: pages are encrypted with it */
    return memcmp(v->key, key, KW_KEY_SIZE) == 0;
  uint8_t *b = kw_arena_take(KW_KEY_SIZE);
  if (!b)
    return false;
  memcpy(b, key, KW_KEY_SIZE);
  v->key = b;
  return true;
}

bool kw_table_put(uint32_t id, uint32_t version, const uint8_t key[KW_KEY_SIZE], bool *rolled) {
  pthread_mutex_lock(&table.mu);
  struct ring *r = find_or_add(id);
  struct version *v = r ? add_version(r, version) : NULL;
  bool ok = v && store(v, key);
  if (v && !ok)
    kw_log(KW_ERROR, "key id %u version %u: the agent sent a key that differs from the one in use, or memory ran out; ignored", id, version);
  if (ok && announce(r))
    *rolled = true;
  pthread_mutex_unlock(&table.mu);
  return ok;
}

void kw_table_generation(uint64_t generation) {
  pthread_mutex_lock(&table.mu);
  table.generation = generation;
  pthread_mutex_unlock(&table.mu);
}

void kw_table_error(uint32_t id, uint32_t version, const struct kw_error *e) {
  pthread_mutex_lock(&table.mu);
  struct ring *r = find(id);
  struct version *v = r ? find_version(r, version) : NULL;
  if (v && (e->class == KW_DENIED || e->class == KW_NOT_FOUND))
    v->refused = table.generation;
  if (r)
    snprintf(r->error, sizeof r->error, "%.1023s", e->text);
  pthread_mutex_unlock(&table.mu);
}

struct collect {
  void *out;
  size_t n, max;
  bool flag;
};

static void want(struct ring *r, void *arg) {
  struct collect *c = arg;
  if (r->state == KW_STATE_DENIED && !c->flag)
    return;
  for (size_t i = 0; i < r->n && c->n < c->max; i++)
    if (r->v[i].listed && !r->v[i].key && (c->flag || r->v[i].refused != table.generation))
      ((struct kw_want *)c->out)[c->n++] = (struct kw_want){r->id, r->v[i].number, r->v[i].number == r->listed_latest};
}

static int current_first(const void *a, const void *b) {
  const struct kw_want *x = a, *y = b;
  if (x->current != y->current)
    return x->current ? -1 : 1;
  if (x->id != y->id)
    return x->id < y->id ? -1 : 1;
  return x->version > y->version ? -1 : 1;
}

size_t kw_table_wanted(struct kw_want *out, size_t max, bool denied) {
  struct collect c = {out, 0, max, denied};
  each(want, &c);
  qsort(out, c.n, sizeof *out, current_first);
  return c.n;
}

static void use(struct ring *r, void *arg) {
  struct collect *c = arg;
  for (size_t i = 0; i < r->n && c->n < c->max; i++)
    if (r->v[i].unreported) {
      r->v[i].unreported = false;
      ((struct kw_use *)c->out)[c->n++] = (struct kw_use){r->id, r->v[i].number, r->v[i].used};
    }
}

size_t kw_table_uses(struct kw_use *out, size_t max) {
  struct collect c = {out, 0, max, false};
  each(use, &c);
  return c.n;
}

static void describe(const struct ring *r, struct kw_row *o) {
  size_t at = 0;
  o->id = r->id;
  o->latest = atomic_load_explicit(&r->latest, memory_order_relaxed);
  o->held = 0;
  o->state = r->state;
  memcpy(o->keyring, r->keyring, sizeof o->keyring);
  memcpy(o->error, r->error, sizeof o->error);
  o->versions[0] = 0;
  for (size_t i = 0; i < r->n; i++) {
    if (!r->v[i].key)
      continue;
    if (at + 16 < sizeof o->versions)
      at += (size_t)sprintf(o->versions + at, o->held ? ",%u" : "%u", r->v[i].number);
    else
      memcpy(o->versions + at, "...", 4);
    o->held++;
  }
}

size_t kw_table_rows(size_t index, struct kw_row *out) {
  size_t next = 0;
  pthread_mutex_lock(&table.mu);
  for (size_t i = index; i < BUCKETS && !next; i++) {
    struct ring *r = atomic_load_explicit(&buckets[i], memory_order_relaxed);
    if (r) {
      describe(r, out);
      next = i + 1;
    }
  }
  pthread_mutex_unlock(&table.mu);
  return next;
}

static void total(struct ring *r, void *arg) {
  uint32_t *t = arg;
  t[0]++;
  for (size_t i = 0; i < r->n; i++)
    t[1] += r->v[i].key != NULL;
  t[2] += r->state == KW_STATE_DENIED;
}

void kw_table_totals(uint32_t *ids, uint32_t *keys, uint32_t *denied) {
  uint32_t t[3] = {0, 0, 0};
  each(total, t);
  *ids = t[0];
  *keys = t[1];
  *denied = t[2];
}

/* Only when no thread can call any more: the server has unhooked the plugin. */
void kw_table_destroy(void) {
  pthread_mutex_lock(&table.mu);
  for (size_t i = 0; i < BUCKETS; i++) {
    struct ring *r = atomic_exchange(&buckets[i], NULL);
    if (r) {
      free(r->v);
      free(r);
    }
  }
  for (size_t i = 0; i < KW_DIRECT_IDS; i++)
    atomic_store(&direct[i], 0);
  table.rings = 0;
  pthread_mutex_unlock(&table.mu);
  kw_arena_destroy();
}
