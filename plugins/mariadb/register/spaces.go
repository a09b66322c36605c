package register

import (
	"context"
	"fmt"
)

// A Space is one InnoDB tablespace as INNODB_TABLESPACES_ENCRYPTION shows it.
type Space struct {
	Name      string // "schema/table" or "innodb_system"
	Encrypted bool
	KeyID     uint32
	Oldest    uint32 // oldest server version any page may have (MIN_KEY_VERSION)
	Newest    uint32 // version the space counts as newest (CURRENT_KEY_VERSION)
	Page      uint64 // page the re-encryption has reached, of MaxPage; 0 when at rest
	MaxPage   uint64
}

// Spaces lists every tablespace the server knows the encryption of. Reading
// it also makes an idle server notice a new key version.
func (s *Server) Spaces(ctx context.Context) ([]Space, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT NAME, ENCRYPTION_SCHEME, CURRENT_KEY_ID, MIN_KEY_VERSION, CURRENT_KEY_VERSION,
		COALESCE(KEY_ROTATION_PAGE_NUMBER, 0), COALESCE(KEY_ROTATION_MAX_PAGE_NUMBER, 0)
		FROM information_schema.INNODB_TABLESPACES_ENCRYPTION ORDER BY NAME`)
	if err != nil {
		return nil, fmt.Errorf("read the tablespaces' encryption: %w", classify(err))
	}
	defer rows.Close()
	var all []Space
	for rows.Next() {
		var sp Space
		var name *string
		if err := rows.Scan(&name, &sp.Encrypted, &sp.KeyID, &sp.Oldest, &sp.Newest, &sp.Page, &sp.MaxPage); err != nil {
			return nil, err
		}
		if name != nil {
			sp.Name = *name
		}
		all = append(all, sp)
	}
	return all, rows.Err()
}

// A Progress sums up how far the spaces of one key id are.
type Progress struct {
	Spaces int    // encrypted spaces under the key id
	Done   int    // of them those whose every page has the target version or a newer one
	Plain  int    // spaces that are not encrypted at all, of any key id
	Oldest uint32 // oldest version still in use, 0: no space
	Behind []string
}

// Measure sums up spaces for a key id against a target server version. That a
// space is done does not mean the older versions may go: redo log, binlogs and
// backups may still need them.
func Measure(spaces []Space, keyID, target uint32) Progress {
	var p Progress
	for _, s := range spaces {
		switch {
		case !s.Encrypted:
			p.Plain++
			continue
		case s.KeyID != keyID:
			continue
		}
		p.Spaces++
		if p.Oldest == 0 || s.Oldest < p.Oldest {
			p.Oldest = s.Oldest
		}
		if s.Oldest >= target {
			p.Done++
		} else {
			p.Behind = append(p.Behind, s.Name)
		}
	}
	return p
}
