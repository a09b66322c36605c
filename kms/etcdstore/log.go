package etcdstore

import (
	"context"
	"log/slog"
	"runtime"
	"slices"
	"strings"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// slogCore is a zapcore.Core that passes etcd's warnings and errors to slog.
type slogCore struct {
	log    *slog.Logger
	fields []zapcore.Field
}

func (c slogCore) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

func (c slogCore) With(f []zapcore.Field) zapcore.Core {
	return slogCore{c.log, append(c.fields[:len(c.fields):len(c.fields)], f...)}
}

func (c slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

// needless are warnings that mean nothing for a member of our own making: its
// schema is known only after its first snapshot, it is never downgraded, it
// tries to be elected a tick before its own membership is applied, and it has
// nobody to publish its name to.
var needless = []string{
	"Failed to detect storage schema version. Please wait till wal snapshot before upgrading cluster.",
	"Failed to detect schema version",
	"failed to update storage version",
	"cannot campaign at term",
	"failed to publish local member to cluster through raft",
}

func (c slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	if slices.ContainsFunc(needless, func(n string) bool { return strings.Contains(e.Message, n) }) {
		return nil
	}
	level := slog.LevelWarn
	if e.Level >= zapcore.ErrorLevel {
		level = slog.LevelError
	}
	c.log.LogAttrs(context.Background(), level, "etcd: "+e.Message, attrs(c.fields, fields)...)
	return nil
}

func (slogCore) Sync() error { return nil }

func attrs(sets ...[]zapcore.Field) []slog.Attr {
	var out []slog.Attr
	for _, set := range sets {
		enc := zapcore.NewMapObjectEncoder()
		for _, f := range set {
			f.AddTo(enc)
		}
		for k, v := range enc.Fields {
			out = append(out, slog.Any(k, v))
		}
	}
	return out
}

// lastWords is what zap does after a Fatal or Panic entry in place of ending
// the process without a word: the store is marked dead with an error that says
// what to do, and the goroutine goes no further. It must not return (etcd
// relies on that), so nothing can be acknowledged after a failed write.
type lastWords struct{ s *Store }

func (h lastWords) OnWrite(ce *zapcore.CheckedEntry, fields []zapcore.Field) {
	words := ce.Message
	for _, f := range fields {
		if err, ok := f.Interface.(error); ok && f.Type == zapcore.ErrorType {
			words += ": " + err.Error()
		}
	}
	h.s.die(fatalError(h.s.cfg.Dir, words))
	if h.s.member.opening.Load() {
		runtime.Goexit() // Open sees it and reports
	}
	// Deferred calls of an etcd goroutine would go on writing; standing still
	// can't. The process is expected to exit (Config.OnFatal).
	select {}
}

// die ends the store with err, once.
func (s *Store) die(err error) {
	s.fatalOnce.Do(func() {
		s.cfg.Logger.Error("the embedded store can't go on", "err", err)
		s.end(err)
		close(s.member.dead)
		if f := s.cfg.OnFatal; f != nil && !s.member.opening.Load() {
			go f(err)
		}
	})
}

func (s *Store) zapLogger() *zap.Logger {
	h := lastWords{s}
	return zap.New(slogCore{log: s.cfg.Logger}, zap.WithFatalHook(h), zap.WithPanicHook(h))
}
