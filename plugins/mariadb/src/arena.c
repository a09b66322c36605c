/* Locked memory for keys. Pages are taken one by one, because the limit of
   locked memory of a service may be as low as 64 KiB; a key is never given
   back before the end (a key the server may still ask for is never dropped),
   so handing out is a bump of an offset.
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "keyward.h"

#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096
#define ALIGN 32

struct page {
  struct page *next;
  size_t used; /* this header included */
};

static struct {
  pthread_mutex_t mu;
  struct page *head;
} arena = {.mu = PTHREAD_MUTEX_INITIALIZER};

static struct page *new_page(void) {
  struct page *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED)
    return NULL;
  madvise(p, PAGE, MADV_DONTDUMP);
  madvise(p, PAGE, MADV_WIPEONFORK);
  /* A server that cannot lock memory must still start: not starting would
     take the data away to protect it from a swap file. It is counted and
     shown (Keyward_unlocked_pages). */
  if (mlock(p, PAGE) != 0)
    KW_COUNT(unlocked_pages);
  p->used = (sizeof *p + ALIGN - 1) / ALIGN * ALIGN;
  return p;
}

uint8_t *kw_arena_take(size_t bytes) {
  bytes = (bytes + ALIGN - 1) / ALIGN * ALIGN;
  uint8_t *out = NULL;
  pthread_mutex_lock(&arena.mu);
  if (!arena.head || bytes > PAGE - arena.head->used) {
    struct page *p = new_page();
    if (p) {
      p->next = arena.head;
      arena.head = p;
    }
  }
  if (arena.head && bytes <= PAGE - arena.head->used) {
    out = (uint8_t *)arena.head + arena.head->used;
    arena.head->used += bytes;
  }
  pthread_mutex_unlock(&arena.mu);
  return out;
}

void kw_arena_destroy(void) {
  pthread_mutex_lock(&arena.mu);
  while (arena.head) {
    struct page *p = arena.head;
    arena.head = p->next;
    explicit_bzero(p, PAGE);
    munlock(p, PAGE);
    munmap(p, PAGE);
  }
  pthread_mutex_unlock(&arena.mu);
}
