package audit

import (
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// The operations of the records that the log writes about itself.
const (
	OpOpen    kms.Operation = "audit.open"    // the first record: names the log, may link an older one
	OpFull    kms.Operation = "audit.full"    // written from the reserve when the disk was full
	OpResumed kms.Operation = "audit.resumed" // records can be written again
	OpTorn    kms.Operation = "audit.torn"    // an unfinished write was cut off at start
	OpRemove  kms.Operation = "audit.remove"  // segments were removed after export
)

// principal is who the records of the log itself name.
const principal = "system/audit"

// Config says where a log is and who signs for it.
type Config struct {
	// Dir holds the files; it is created with mode 0700. One log per node and
	// one process per log. A file system of its own is wise.
	Dir string
	// Signer is the audit key: EC P-256, or RSA from 2048 bits. It signs SHA-256
	// digests and may be slow; appending does not wait for it.
	Signer crypto.Signer
	// Trusted are audit keys used earlier in this log.
	Trusted []crypto.PublicKey
	// Link, for a log that does not exist yet, joins it to the log it follows.
	Link *Link
	// SegmentBytes is the size at which a new file is begun. Default 32 MiB, at
	// least 64 KiB.
	SegmentBytes int64
	// CheckpointEvery bounds the age of a record without a checkpoint, signing
	// apart. Default 500 ms, at most 1 s.
	CheckpointEvery time.Duration
	// Deadline bounds how long Append waits for the disk. Default 2 s.
	Deadline time.Duration
	// OrphanAfter is the age at which an intent without outcome gets a closing
	// record while the process runs. Default 1 h.
	OrphanAfter time.Duration
	// RetryEvery is how often a log that can't be written tries to recover.
	// Default 1 s.
	RetryEvery time.Duration
	// Clock dates the records of the log itself and events without a time.
	// Default: the system's.
	Clock kms.Clock
	// Logger gets what operators should see. Default: discarded.
	Logger *slog.Logger
}

// A Link joins a new log to the head of the one it follows, after a disaster.
type Link struct {
	Checkpoint []byte           // newest known checkpoint of the older log
	Key        crypto.PublicKey // that signed it
}

const (
	defaultSegment  = 32 << 20
	minSegment      = 64 << 10
	roomBytes       = 1 << 20   // of zeros made ahead of the records
	reserveBytes    = 512 << 10 // freed to write that the disk is full
	defaultDeadline = 2 * time.Second
)

type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }

// complete checks c and fills in the defaults; all mistakes come at once.
func (c Config) complete() (Config, error) {
	var errs []error
	bad := func(format string, a ...any) {
		errs = append(errs, fmt.Errorf("%w: audit: "+format, append([]any{dek.ErrInvalid}, a...)...))
	}
	if !filepath.IsAbs(c.Dir) {
		bad("directory %q must be an absolute path", c.Dir)
	}
	if c.Signer == nil {
		bad("no audit key")
	} else if _, err := algorithm(c.Signer.Public()); err != nil {
		errs = append(errs, err)
	}
	if c.SegmentBytes == 0 {
		c.SegmentBytes = defaultSegment
	}
	if c.SegmentBytes < minSegment {
		bad("segments of %d bytes are below %d", c.SegmentBytes, minSegment)
	}
	for _, d := range []struct {
		v         *time.Duration
		otherwise time.Duration
	}{
		{&c.CheckpointEvery, 500 * time.Millisecond}, {&c.Deadline, defaultDeadline},
		{&c.OrphanAfter, time.Hour}, {&c.RetryEvery, time.Second},
	} {
		if *d.v == 0 {
			*d.v = d.otherwise
		}
		if *d.v < 0 {
			bad("negative duration %v", *d.v)
		}
	}
	if c.CheckpointEvery > time.Second {
		bad("checkpoints every %v: at most 1s", c.CheckpointEvery)
	}
	if c.Clock == nil {
		c.Clock = systemClock{}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, errors.Join(errs...)
}
