/* One connection to the agent, every call with a deadline.
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KEYWARD_WIRE_H
#define KEYWARD_WIRE_H

#include "proto.h"

/* Used by one thread at a time. A call that fails in any way but with an
   ERROR frame of the agent closes the connection. */
struct kw_conn {
  int fd; /* -1: closed */
  int wake; /* readable: give up what is under way; -1: none */
  uint32_t seq;
  uint8_t *secret; /* locked memory for replies that hold a key */
  uint8_t buf[KW_MAX_FRAME];
};

/* Bytes of kw_conn.secret: a GET reply's body, rounded up to arena slots. */
#define KW_SECRET 64

void kw_conn_init(struct kw_conn *c, int wake, uint8_t *secret);
void kw_conn_close(struct kw_conn *c);

/* Deadlines are kw_now_ms() values. */
enum kw_class kw_conn_open(struct kw_conn *c, const char *path, uint64_t deadline, struct kw_error *e);
enum kw_class kw_call_hello(struct kw_conn *c, const struct kw_hello *h, uint64_t deadline, struct kw_hello_reply *out, struct kw_error *e);
enum kw_class kw_call_list(struct kw_conn *c, uint64_t deadline, struct kw_list *out, struct kw_error *e);
enum kw_class kw_call_get(struct kw_conn *c, const struct kw_want *w, uint64_t deadline, uint8_t key[KW_KEY_SIZE], struct kw_error *e);
enum kw_class kw_call_wait(struct kw_conn *c, uint64_t generation, uint32_t wait_ms, uint64_t deadline, uint64_t *out, struct kw_error *e);
enum kw_class kw_call_report(struct kw_conn *c, const struct kw_use *u, size_t n, uint64_t deadline, struct kw_error *e);

#endif
