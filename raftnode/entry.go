package raftnode

// EntryCommands returns the commands packed into the Data of a normal entry, for
// tools that show a log. They alias data.
func EntryCommands(data []byte) ([][]byte, error) {
	if len(data) == 0 {
		return nil, nil
	}
	_, cmds, err := decodeEnvelope(data, nil)
	return cmds, err
}
