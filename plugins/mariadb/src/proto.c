/* Agent socket protocol v1: encode and parse. Pure functions, fuzzed by
   test/harness.c.
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#include "proto.h"

#include <string.h>

#define KW_NO_VERSION 0xffffffffu /* the server's "no such version" */

/* ---- writing ------------------------------------------------------------ */

struct writer {
  uint8_t *b;
  size_t n, cap;
  bool full;
};

static void put(struct writer *w, const void *p, size_t n) {
  if (w->full || n > w->cap - w->n) {
    w->full = true;
    return;
  }
  memcpy(w->b + w->n, p, n);
  w->n += n;
}

static void put_uint(struct writer *w, uint64_t v, unsigned bytes) {
  uint8_t b[8];
  for (unsigned i = 0; i < bytes; i++)
    b[i] = (uint8_t)(v >> (8 * (bytes - 1 - i)));
  put(w, b, bytes);
}

static void put_string(struct writer *w, const char *s) {
  size_t n = strlen(s);
  if (n > 0xffff) {
    w->full = true;
    return;
  }
  put_uint(w, n, 2);
  put(w, s, n);
}

static struct writer begin(uint8_t *b, size_t cap, enum kw_op op, uint32_t seq) {
  struct writer w = {b, 0, cap, false};
  put_uint(&w, 0, 4);
  put_uint(&w, op, 1);
  put_uint(&w, seq, 4);
  return w;
}

static size_t end(struct writer *w) {
  if (w->full || w->n > KW_MAX_FRAME)
    return 0;
  struct writer head = {w->b, 0, 4, false};
  put_uint(&head, w->n - 4, 4);
  return w->n;
}

size_t kw_put_hello(uint8_t *b, size_t cap, uint32_t seq, const struct kw_hello *h) {
  struct writer w = begin(b, cap, KW_OP_HELLO, seq);
  put(&w, "KWA1", 4);
  put_uint(&w, 1, 2);
  put_string(&w, "mariadb");
  put_string(&w, h->instance);
  put(&w, h->nonce, 16);
  put_uint(&w, h->cold, 1);
  return end(&w);
}

size_t kw_put_list(uint8_t *b, size_t cap, uint32_t seq) {
  struct writer w = begin(b, cap, KW_OP_LIST, seq);
  return end(&w);
}

size_t kw_put_get(uint8_t *b, size_t cap, uint32_t seq, uint32_t id, uint32_t version) {
  struct writer w = begin(b, cap, KW_OP_GET, seq);
  put_uint(&w, id, 4);
  put_uint(&w, version, 4);
  return end(&w);
}

size_t kw_put_wait(uint8_t *b, size_t cap, uint32_t seq, uint64_t generation, uint32_t ms) {
  struct writer w = begin(b, cap, KW_OP_WAIT, seq);
  put_uint(&w, generation, 8);
  put_uint(&w, ms, 4);
  return end(&w);
}

size_t kw_put_report(uint8_t *b, size_t cap, uint32_t seq, const struct kw_use *u, size_t n) {
  if (n > 0xffff)
    return 0;
  struct writer w = begin(b, cap, KW_OP_REPORT, seq);
  put_uint(&w, n, 2);
  for (size_t i = 0; i < n; i++) {
    put_uint(&w, u[i].id, 4);
    put_uint(&w, u[i].version, 4);
    put_uint(&w, u[i].unix_seconds, 8);
  }
  return end(&w);
}

/* ---- reading ------------------------------------------------------------ */

struct reader {
  const uint8_t *p, *end;
  bool bad;
};

static const uint8_t *take(struct reader *r, size_t n) {
  if (r->bad || n > (size_t)(r->end - r->p)) {
    r->bad = true;
    return NULL;
  }
  const uint8_t *p = r->p;
  r->p += n;
  return p;
}

static uint64_t take_uint(struct reader *r, unsigned bytes) {
  const uint8_t *p = take(r, bytes);
  uint64_t v = 0;
  for (unsigned i = 0; p && i < bytes; i++)
    v = v << 8 | p[i];
  return v;
}

/* Copies a string, cut to cap, with what a log or a terminal could take for a
   command replaced: control bytes end up in an operator's error log. */
static void take_string(struct reader *r, char *out, size_t cap) {
  size_t n = take_uint(r, 2);
  const uint8_t *p = take(r, n);
  if (!p)
    n = 0;
  if (n > cap - 1)
    n = cap - 1;
  for (size_t i = 0; i < n; i++)
    out[i] = p[i] < 0x20 || p[i] == 0x7f ? ' ' : (char)p[i];
  out[n] = 0;
}

static bool done(const struct reader *r) { return !r->bad && r->p == r->end; }

uint32_t kw_u32(const uint8_t *b) {
  return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

bool kw_get_header(const uint8_t b[KW_HEADER], struct kw_header *out) {
  uint32_t n = kw_u32(b);
  if (n < KW_MIN_LENGTH || n > KW_MAX_LENGTH)
    return false;
  out->body = n - KW_MIN_LENGTH;
  out->op = b[4];
  out->seq = kw_u32(b + 5);
  return true;
}

bool kw_get_hello_reply(const uint8_t *b, size_t n, struct kw_hello_reply *out) {
  struct reader r = {b, b + n, false};
  take_string(&r, out->instance, sizeof out->instance);
  take_string(&r, out->endpoints, sizeof out->endpoints);
  out->refresh_ms = (uint32_t)take_uint(&r, 4);
  return done(&r);
}

/* A key id and each version must be numbers that the server can use, the
   versions ascending, the latest among them. (Newer ones may be listed that the
   agent was refused: they are not to be encrypted with.) */
static bool take_entry(struct reader *r, struct kw_list_entry *e) {
  e->id = (uint32_t)take_uint(r, 4);
  e->latest = (uint32_t)take_uint(r, 4);
  uint64_t state = take_uint(r, 1);
  take_string(r, e->keyring, sizeof e->keyring);
  e->count = (uint16_t)take_uint(r, 2);
  e->versions = take(r, (size_t)e->count * 4);
  if (r->bad || e->id == 0 || e->count == 0)
    return false;
  if (state < KW_STATE_ACTIVE || state > KW_STATE_STALE)
    return false;
  e->state = (enum kw_state)state;
  uint32_t last = 0;
  bool has_latest = false;
  for (unsigned i = 0; i < e->count; i++) {
    uint32_t v = kw_u32(e->versions + 4 * i);
    if (v <= last || v == KW_NO_VERSION)
      return false;
    last = v;
    has_latest |= v == e->latest;
  }
  return has_latest;
}

bool kw_get_list(const uint8_t *b, size_t n, struct kw_list *out) {
  struct reader r = {b, b + n, false};
  out->generation = take_uint(&r, 8);
  out->left = (uint16_t)take_uint(&r, 2);
  out->next = r.p;
  out->end = r.end;
  struct kw_list_entry e;
  for (unsigned i = 0; !r.bad && i < out->left; i++)
    if (!take_entry(&r, &e))
      return false;
  return done(&r);
}

bool kw_list_next(struct kw_list *l, struct kw_list_entry *out) {
  if (l->left == 0)
    return false;
  struct reader r = {l->next, l->end, false};
  if (!take_entry(&r, out))
    return false;
  l->left--;
  l->next = r.p;
  return true;
}

bool kw_get_key(const uint8_t *b, size_t n, uint32_t id, uint32_t version, uint8_t key[KW_KEY_SIZE]) {
  struct reader r = {b, b + n, false};
  uint64_t got_id = take_uint(&r, 4), got_version = take_uint(&r, 4);
  uint64_t size = take_uint(&r, 1);
  const uint8_t *p = take(&r, KW_KEY_SIZE);
  if (!done(&r) || got_id != id || got_version != version || size != KW_KEY_SIZE)
    return false;
  memcpy(key, p, KW_KEY_SIZE);
  return true;
}

bool kw_get_generation(const uint8_t *b, size_t n, uint64_t *out) {
  struct reader r = {b, b + n, false};
  *out = take_uint(&r, 8);
  return done(&r);
}

bool kw_get_error(const uint8_t *b, size_t n, struct kw_error *out) {
  struct reader r = {b, b + n, false};
  uint64_t class = take_uint(&r, 2);
  take_string(&r, out->text, sizeof out->text);
  if (!done(&r))
    return false;
  bool known = class >= KW_INVALID && class <= KW_INTERNAL;
  out->class = known ? (enum kw_class)class : KW_INTERNAL;
  return true;
}
