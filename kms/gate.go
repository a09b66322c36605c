package kms

// An unwrap holds the gate (for reading) from its last look at the rules until
// its key is out, across the record of its outcome. Whatever takes a right
// away is published first and then passes the gate once: when that call has
// returned, no key leaves under the old rules, and no record says that one did.

// settle waits for the keys that are on their way out under older rules: no
// longer than for one record of the log.
func (s *Service) settle() {
	s.gate.Lock()
	defer s.gate.Unlock()
}

// still looks at the rules again for an unwrap that was let through. Nothing
// was taken away if no change was made since.
func (s *Service) still(t ticket) (rule string, err error) {
	v := s.view.Load()
	if v == t.view {
		return t.rule, nil
	}
	if rule, err = s.decide(t.caller, OpKeyringUnwrap, ringScope(t.header.Vault, t.header.Keyring)); err != nil {
		return rule, err
	}
	if why, err := v.usable(t.header); err != nil {
		return why, err
	}
	return rule, nil
}
